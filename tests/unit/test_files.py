# SPDX-License-Identifier: Apache-2.0
"""Atomic files and folders under real kills, stamps, and that nothing in the package writes in another way."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from effsam3.errors import UserError
from effsam3.files import atomic_file, atomic_folder, stamp, write_bytes, write_json, write_text

WITHOUT_END = """
import itertools, sys
from pathlib import Path
from effsam3.files import atomic_folder, write_json
path = Path(sys.argv[1])
print("begun", flush=True)
for number in itertools.count():
    write_json(path / "file.json", [number] * 20_000)
    with atomic_folder(path / "folder") as folder:
        for name in "abc":
            (folder / name).write_text(str(number))
"""
HALF = """
import sys, time
from pathlib import Path
from effsam3.files import atomic_file, atomic_folder
path = Path(sys.argv[1])
with atomic_file(path / "file") as file, atomic_folder(path / "folder") as folder:
    for part in (file, folder / "inside"):
        part.write_text("new, but only hal")
    print("begun", flush=True)
    time.sleep(60)
"""


def killed(code, path, after):
    """Run code on a folder and kill it some time after it has printed a line."""
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    time.sleep(after)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def visible(path):
    return sorted(one.name for one in path.iterdir() if not one.name.startswith("."))


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")
    killed(HALF, tmp_path, 0)
    assert visible(tmp_path) == ["file", "folder"] and len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"
    write_text(tmp_path / "file", "new")
    with atomic_folder(tmp_path / "folder") as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "file").read_text() == "new" and not visible(tmp_path / "folder")


def test_kills_at_any_time_leave_whole_files(tmp_path):
    for trial in range(4):
        killed(WITHOUT_END, tmp_path, random.Random(trial).uniform(0.01, 0.1))
        numbers = json.loads((tmp_path / "file.json").read_text())
        assert len(numbers) == 20_000 and len(set(numbers)) == 1
        assert set(visible(tmp_path)) <= {"file.json", "folder"}
        folder = tmp_path / "folder"  # no call replaces a folder: for an instant it is not there
        if folder.is_dir():
            assert visible(folder) == ["a", "b", "c"] and len({one.read_text() for one in folder.iterdir()}) == 1


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "file") as file:
        file.write_text("new")
        raise OSError("full")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {1, 2})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"


def test_all_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    hidden = str(tmp_path / ".out.partial")
    assert done[-2:] == [hidden, str(tmp_path)] and set(done[:-2]) == {f"{hidden}/inner", f"{hidden}/inner/file"}
    done.clear()
    write_text(tmp_path / "file", "x")
    assert done == [str(tmp_path / f".file.{os.getpid()}.partial"), str(tmp_path)]


def test_others_may_read_what_safetensors_writes(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        (folder / "file").chmod(0o600)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o644


# ---- stamps


def test_a_stamp_lets_the_same_settings_pass_only(tmp_path):
    file = tmp_path / "data" / "synthetic.json"
    for _ in range(2):
        stamp(file, {"images": 4, "seed": 0}, "synthetic images", "data.index", real=tmp_path / "data" / "index")
        (tmp_path / "data" / "index").write_text("made")
    assert json.loads(file.read_text()) == {"images": 4, "seed": 0}
    with pytest.raises(UserError) as error:
        stamp(file, {"images": 5, "seed": 0}, "synthetic images", "data.index")
    for part in ("data.index: ", "'images': 4", "'images': 5", "synthetic images", "delete this one"):
        assert part in str(error.value)
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged.*delete it and what is next to it"):
        stamp(file, {"images": 4, "seed": 0}, "synthetic images", "data.index")


def test_what_has_no_stamp_is_not_touched(tmp_path):
    (tmp_path / "index").write_text("real")
    with pytest.raises(UserError, match="index is there and was not made from synthetic images; name another path"):
        stamp(tmp_path / "stamp", {}, "synthetic images", "data.index", real=tmp_path / "index")
    assert visible(tmp_path) == ["index"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.index: .* cannot be written"):
        stamp(tmp_path / "file" / "stamp", {}, "synthetic images", "data.index")
