# SPDX-License-Identifier: Apache-2.0
"""A place that cannot be written is named with the option or key for it, before any work is done."""

from pathlib import Path

import pytest

from effsam3 import cli
from effsam3.errors import UserError
from effsam3.files import refuse_unwritable

RECIPES = Path(__file__).parents[2] / "recipes" / "smoke"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["launch", f"{RECIPES}/image.yaml", "train.runs=/proc/x"],
            "train.runs: /proc/x/smoke-image cannot be written",
        ),
        (["launch", f"{RECIPES}/image.yaml", "embed.to=/proc/x"], "embed.to: /proc/x cannot be written"),
        (
            ["merge", f"{RECIPES}/image.yaml", "train.runs=/proc/x"],
            "train.runs: /proc/x/smoke-image cannot be written",
        ),
        (["embed", f"{RECIPES}/image.yaml", "embed.to=/proc/x"], "embed.to: /proc/x cannot be written"),
        (
            ["train", f"{RECIPES}/image.yaml", "train.runs=/proc/x"],
            "train.runs: /proc/x/smoke-image cannot be written",
        ),
        (["import", "student.pt", "--to", "/proc/x/y"], "--to: /proc/x cannot be written"),
    ],
)
def test_the_option_or_key_is_named(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == []


def test_looking_makes_nothing(tmp_path):
    refuse_unwritable(tmp_path / "a" / "b", "--out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--out: xxx.*cannot be written .*File name too long.; name a folder"):
        refuse_unwritable(Path("x" * 300), "--out")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"--out: {folder} cannot be written .*Not a directory.; name a folder"):
            refuse_unwritable(folder, "--out")
