# SPDX-License-Identifier: Apache-2.0
"""What mypy cannot ask for: parameters that carry a run have their class, so that it can check their use."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "effsam3"
CARRIERS = {"recipe", "stage", "accelerator", "report"}
OWN_RECIPES = PACKAGE / "stages/protocol.py"  # each stage takes the recipes of its own class


def untyped(file):
    """Yield the parameters of a file that carry a run and have no class."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                hint = argument.annotation and ast.unparse(argument.annotation)
                if argument.arg in CARRIERS and hint in (None, "Any", "object"):
                    yield f"{file.relative_to(PACKAGE)}:{argument.lineno} {node.name}({argument.arg})"


def test_what_carries_a_run_has_its_class():
    assert [found for file in sorted({*PACKAGE.rglob("*.py")} - {OWN_RECIPES}) for found in untyped(file)] == []


def test_nothing_is_ignored_without_a_code_and_a_reason():
    for file in PACKAGE.rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            _, mark, reason = line.partition("# type: ignore")
            assert not mark or (reason.startswith("[") and "  # " in reason), f"{file}: {line.strip()}"
