# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs tell people to type must exist; the quick commands are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
QUICK = ("show", "compare")


def commands() -> list[list[str]]:
    """Every command line of every bash block, as words."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]
    return found


def test_every_file_that_is_named_exists():
    words = {word for command in commands() for word in command}
    named = {word for word in words if re.match(r"(scripts|recipes|accelerate_configs)/\S+\.\w+$", word)}
    assert len(named) >= 8
    for document in DOCUMENTS:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
        named |= {str((document.parent / link).resolve().relative_to(REPOSITORY)) for link in links}
    assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()]


def test_every_verb_and_script_answers_help():
    verbs = {command[1] for command in commands() if command[0] == "effsam3"} | {
        "embed",
        "train",
        "merge",
        "evaluate",
    }
    for verb in sorted(verbs):
        done = subprocess.run(
            [sys.executable, "-m", "effsam3.cli", verb, "--help"], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0 and verb in done.stdout, verb


@pytest.mark.parametrize("verb", QUICK)
def test_quick_verbs_answer(verb):
    recipe = ["recipes/stage1/image/es_rv_m.yaml"] if verb == "show" else []
    done = subprocess.run(
        [sys.executable, "-m", "effsam3.cli", verb, *recipe],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "7,774,864" in done.stdout


def test_the_students_table_is_that_of_the_registry():
    from effsam3.models.registry import IMAGE_STUDENTS, head_params

    readme = (REPOSITORY / "README.md").read_text()
    for row in IMAGE_STUDENTS.values():
        if row.published_millions is not None:
            total = row.trunk_params + head_params("fused", row.channels, 1024)
            saved = 100 * (1 - total / 446_236_672)
            assert (
                f"{row.trunk_params / 1e6:.2f}" in readme
                and f"{total / 1e6:.2f}" in readme
                and f"{saved:.2f}" in readme
            )
