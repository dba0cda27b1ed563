# SPDX-License-Identifier: Apache-2.0
"""The tests' own conftest.py: no test sees or changes what lies in the clone's runs/ and data/, or it is named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
GOOD = """
from pathlib import Path

def test_one():
    assert not Path("runs").exists() and not Path("data").exists()
    Path("runs").mkdir()

def test_two():
    assert not Path("runs").exists() and not Path("~").expanduser().joinpath(".cache").exists()
"""
BAD = """
from pathlib import Path

CLONE = Path(__file__).parents[1]

def test_bad():
    {line}
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone with this conftest.py, one good file of tests, and what earlier runs may have left."""
    (tmp_path / "tests").mkdir()
    shutil.copy(CONFTEST, tmp_path / "tests/conftest.py")
    (tmp_path / "tests/test_good.py").write_text(GOOD)
    for folder in ("runs/smoke-image", "data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "recipe.yaml").write_bytes(b"\xff strange")
    return tmp_path


def ends_with(clone: Path, *options: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options], cwd=clone, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("--numprocesses", "2")])
def test_tests_that_stay_in_their_folders_pass(clone, options):
    code, printed = ends_with(clone, *options)
    assert code == 0 and "2 passed" in printed, printed
    assert (clone / "runs/smoke-image/recipe.yaml").read_bytes() == b"\xff strange"


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("(CLONE / 'runs/new').mkdir()", "runs/new"),
        ("(CLONE / 'runs/smoke-image/recipe.yaml').write_text('mine')", "runs/smoke-image/recipe.yaml"),
        ("(CLONE / 'data/recipe.yaml').unlink()", "data/recipe.yaml"),
        ("(CLONE / 'wandb').mkdir()", "wandb"),
    ],
)
def test_a_test_that_writes_in_the_clone_is_found(clone, line, path):
    (clone / "tests/test_bad.py").write_text(BAD.format(line=line))
    code, printed = ends_with(clone, *(("--numprocesses", "2") if path == "wandb" else ()))
    assert code == 1 and "3 passed" in printed and f"FAILED {clone / path} changed" in printed, printed
