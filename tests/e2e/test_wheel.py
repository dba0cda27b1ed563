# SPDX-License-Identifier: Apache-2.0
"""A wheel, built from a source distribution and installed where there is no clone, trains like a clone."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ENVIRONMENT, REPOSITORY
from libraries import link_libraries

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# Notes in FILE what a process opens below CLONE, except where the libraries are.
WATCH = """
import os, sys

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith({clone!r}) and not path.startswith({libraries!r}):
            with os.fdopen(os.open({file!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as file:
                file.write(path + "\\n")

sys.addaudithook(note)
"""


def call(*line, **options) -> str:
    """Run a command line and return what it printed."""
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution of the clone, and the wheel that is built of it alone."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("distributions")
    # Not in the clone: setuptools leaves a build folder where it builds.
    files = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).splitlines()
    for name in files:
        if (REPOSITORY / name).is_file():  # not one that has been deleted
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    call(sys.executable, "-c", code, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    call(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_recipes_and_accelerate_configs_are_in_both(distributions):
    sdist, wheel = distributions
    wanted = {
        f"{folder}/{file.relative_to(REPOSITORY / folder).as_posix()}"
        for folder in ("recipes", "accelerate_configs")
        for file in (REPOSITORY / folder).rglob("*.yaml")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.removeprefix("effsam3/") for name in names if name.endswith(".yaml")} == wanted
    assert "effsam3/report.html" in names
    # One top-level name, so that no other package is touched.
    assert {name.split("/")[0] for name in names} == {
        "effsam3",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"setup.py", "LICENSE", "README.md", "scripts/train.py", "tests/conftest.py"} <= names


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> tuple[Path, dict[str, str], Path]:
    """A fresh environment with the wheel, as its `bin`, the variables to run it with, and the watch's file.

    The libraries are those of the tests' own environment without any extra: a plain `pip install effsam3`.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    call(*PIP, "--python", folder / "venv/bin/python", "install", "--no-index", "--no-deps", distributions[1])
    (site,) = folder.glob("venv/lib/python*/site-packages")
    link_libraries(site)
    (site / "watch.pth").write_text("import watch\n")
    noted = folder / "opened.txt"
    names = {"clone": f"{REPOSITORY}/", "libraries": f"{REPOSITORY}/.venv/", "file": str(noted)}
    (site / "watch.py").write_text(WATCH.format(**names))
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    return folder / "venv/bin", environment | {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}, noted


def test_the_watch_notices_the_clone(installed, tmp_path):
    """And so finds what the tests below rule out."""
    bin, environment, noted = installed
    call(bin / "python", "-c", "import effsam3.cli", env=environment | {"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path)
    assert f"{REPOSITORY}/effsam3/" in noted.read_text()
    noted.unlink()


def test_a_shipped_recipe_runs_by_its_short_name(installed, tmp_path):
    """Every verb in order, on an accelerate config of the wheel, in a folder without either."""
    bin, environment, noted = installed
    small = ["data.synthetic_images=24", "train.steps=4", "optim.warmup_steps=1", "train.eval_every=4"]
    small += ["train.save_every=4", "train.eval_samples=2", "evaluate.max_images=2"]
    said = call(bin / "effsam3", "launch", "smoke/image", "hardware=ddp_cpu", *small, env=environment, cwd=tmp_path)
    assert f"--config_file {bin.parent}/lib/" in said and "--module effsam3 train smoke/image" in said
    run = tmp_path / "runs/smoke-image"
    assert (run / "merged/model.safetensors").is_file() and list((run / "eval").glob("*.json"))
    assert "complete" in call(bin / "effsam3", "status", "smoke/image", env=environment, cwd=tmp_path)
    assert not noted.exists(), noted.read_text()
