# SPDX-License-Identifier: Apache-2.0
"""What stands between a run and wandb, and which wandb run it is."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from effsam3.training.loggers import Loggers, set_torn_parts_aside, wandb_obstacle, wandb_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """A port on this machine that takes connections, as wandb's host."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def test_no_login(home, server):
    assert wandb_obstacle() == "no login"


def test_a_key_in_the_environment(home, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_obstacle() == ""


def test_a_key_in_netrc(home, server):
    (home / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password k\n")
    (home / ".netrc").chmod(0o600)
    assert wandb_obstacle() == ""
    (home / ".netrc").write_text("machine example.org\n  login user\n  password k\n")
    assert wandb_obstacle() == "no login"


def test_no_connection(home, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    server.close()
    assert "127.0.0.1 cannot be reached" in wandb_obstacle()


# ---- one wandb run per run folder


def test_a_run_folder_keeps_its_id_also_where_it_moves(home):
    folder = home / "runs/a"
    folder.mkdir(parents=True)
    run_id = wandb_run(folder)["id"]
    assert len(run_id) == 8 and wandb_run(folder)["id"] == run_id
    moved = folder.rename(home / "runs/b")
    assert wandb_run(moved)["id"] == run_id
    folder.symlink_to(moved)
    assert wandb_run(folder)["id"] == run_id


def test_a_copy_gets_another_and_a_backup_does_not(home):
    folder = home / "run"
    folder.mkdir()
    run_id = wandb_run(folder)["id"]
    copy = wandb_run(Path(shutil.copytree(folder, home / "copy")))["id"]
    assert copy != run_id and wandb_run(home / "copy")["id"] == copy
    shutil.copytree(folder, home / "backup")
    shutil.rmtree(folder)
    (home / "another").mkdir()  # takes the place of the folder in the file system, perhaps
    shutil.copytree(home / "backup", folder)
    assert wandb_run(folder)["id"] == run_id


def test_the_id_that_the_environment_gives_counts(home, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-7")
    assert wandb_run(home)["id"] == "sweep-7"


def test_what_a_kill_has_left_is_not_uploaded(home):
    for name in ("1-abc", "2-abc", "3-abc", "4-other"):
        (home / f"wandb/offline-run-{name}").mkdir(parents=True)
    (home / "wandb/offline-run-3-abc/run.wandb.synced").touch()
    set_torn_parts_aside(home, {"id": "abc", "parts": ["offline-run-1-abc"]})
    names = sorted(path.name for path in (home / "wandb").iterdir())
    assert names == [*(f"offline-run-{name}" for name in ("1-abc", "3-abc", "4-other")), "torn-offline-run-2-abc"]


class Tracker:
    """Notes what it is given; `broken`: its process has ended."""

    def __init__(self, name):
        self.name, self.logged, self.broken = name, [], False

    def log(self, values, step):
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.logged.append(step)

    def finish(self):
        self.log({}, "end")


def test_no_step_twice_and_no_end_by_a_tracker_that_has_ended(tmp_path):
    wandb, board = Tracker("wandb"), Tracker("tensorboard")
    said, ended = [], []
    accelerator = SimpleNamespace(trackers=[wandb, board], end_training=lambda: ended.append(True))
    loggers = Loggers(accelerator, ("wandb", "tensorboard"), tmp_path, said.append)
    loggers.wandb_from = 8  # an earlier start logged seven
    for step in (6, 7, 8):
        loggers.log({"train/loss": 1.0}, step)
    assert (wandb.logged, board.logged) == ([8], [6, 7, 8])
    wandb.broken = True
    for step in (9, 10):
        loggers.log({"train/loss": 1.0}, step)
    assert len(said) == 1 and "its own process has ended (Connection lost)" in said[0]
    assert board.logged == [6, 7, 8, 9, 10] and accelerator.trackers == [board]
    loggers.finish()
    assert accelerator.trackers == [] and ended == [True] and len(said) == 1
