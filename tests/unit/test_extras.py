# SPDX-License-Identifier: Apache-2.0
"""What setup.py leaves to extras, and what is said where one is missing.

The libraries of these tests have them all, so processes are given links to the others. tests/e2e/test_wheel.py trains
with no more than these.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import EXTRAS, link_libraries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Run `effsam3` where no extra is installed; returns its exit code and what it printed as an error."""
    libraries = link_libraries(tmp_path_factory.mktemp("libraries"))

    def run(*arguments):
        # -S: not what is installed, only what PYTHONPATH names.
        line = [sys.executable, "-S", "-m", "effsam3", *arguments]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{libraries}"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["train", "smoke/image", "train.loggers=[wandb]"], "wandb"),
        (["launch", "smoke/image", "train.loggers=[tensorboard]"], "tensorboard"),
        (["launch", "smoke/image", "embed", "hardware=zero2_cpu"], "deepspeed"),
        (["train", "smoke/lora"], "lora"),
        (["export", "tiny"], "onnx"),
        (["demo", "tiny"], "demo"),
    ],
)
def test_a_missing_extra_is_a_sentence_with_the_command(arguments, extra, without, tmp_path):
    code, said = without(*arguments)
    assert code == 2 and said.count("\n") == 1, said
    assert f'needs {EXTRAS[extra]}, which is not installed: pip install "effsam3[{extra}]"' in said
    assert not list(tmp_path.iterdir())  # asked before anything began


def test_extras_are_asked_for_by_recipes_only(without):
    assert without("launch", "smoke/image", "merge", "hardware=zero2_cpu", "train.loggers=[wandb]")[0] == 2  # no run
    code, said = without("show", "smoke/image", "hardware=zero2_cpu", "train.loggers=[wandb]")
    assert (code, said) == (0, "")


def test_setup_names_the_extras(tmp_path):
    code = "import setuptools; setuptools.setup = lambda **options: print(options['extras_require'])\n"
    code += (ROOT / "setup.py").read_text()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", f"__file__ = {str(ROOT / 'setup.py')!r}\n{code}"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    extras = eval(printed)
    named = extras.keys() - {"all", "dev"}
    assert named == set(EXTRAS)
    assert set(extras["all"]) == {requirement for name in named for requirement in extras[name]} < set(extras["dev"])
