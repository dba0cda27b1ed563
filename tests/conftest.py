# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: no network, one thread, nothing of this machine's caches, logins and earlier runs.

Every test runs in an empty folder of its own, where `runs/` and `data/` are its own, too. The clone is compared with
what it was before: a test that writes there would one day read what somebody else has left.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# What Python, git and the tools themselves write.
NOT_OURS = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "effsam3.egg-info"}
HOME = tempfile.TemporaryDirectory(prefix="effsam3-tests-home-")

# Before torch is imported anywhere: with more threads tiny models get slower, not faster.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HOME"] = HOME.name
os.environ["HF_HOME"] = f"{HOME.name}/huggingface"
os.environ["XDG_CACHE_HOME"] = f"{HOME.name}/.cache"
os.environ["EFFSAM3_CACHE"] = f"{HOME.name}/effsam3"


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_clone(tmp_path_factory):
    """For what fixtures of modules do before any test."""
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(REPOSITORY)


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_another_module():
    """accelerate keeps one state a process, and so do we of a request to stop: another module's would decide here."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "effsam3.stopping" in sys.modules:
        from effsam3.stopping import STOP

        STOP.asked = False


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The working directory, with the recipes and accelerate configs of a clone, but no runs."""
    for name in ("accelerate_configs", "recipes"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


# ---- the clone, before and after

BEFORE = pytest.StashKey[dict[str, tuple[int, int] | None]]()
CHANGED = pytest.StashKey[list[str]]()


def state_of_the_clone() -> dict[str, tuple[int, int] | None]:
    """What is in the clone: {path: None}, and below runs/ and data/ {path: (bytes, time of the last change)}.

    Of other folders only the names: somebody may go on writing in them while the tests run.
    """
    found = dict.fromkeys(str(path) for path in REPOSITORY.iterdir() if path.name not in NOT_OURS)
    for path in (path for name in ("runs", "data") for path in (REPOSITORY / name).rglob("*")):
        state = path.lstat()
        found[str(path)] = None if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found


def pytest_sessionstart(session):
    """Look at the clone, in the one process that starts first and ends last."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        session.config.stash[BEFORE] = state_of_the_clone()


def pytest_sessionfinish(session):
    """Fail if the clone is not what it was."""
    if BEFORE in session.config.stash:
        before, after = session.config.stash[BEFORE], state_of_the_clone()
        changed = sorted(path for path, _ in before.items() ^ after.items())
        session.config.stash[CHANGED] = list(dict.fromkeys(changed))
        if changed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Name what changed."""
    for path in config.stash.get(CHANGED, []):
        terminalreporter.line(f"FAILED {path} changed: a test, or somebody else meanwhile, wrote there", red=True)
