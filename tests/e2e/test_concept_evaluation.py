# SPDX-License-Identifier: Apache-2.0
"""The benchmark `concepts` shared by two processes, killed, and resumed by one: the numbers are those of one run."""

import json
import shutil
import signal

from commands import Family, command, run
from concept_data import draw_concepts, merged_with_concepts

from effsam3 import evaluate
from effsam3.recipe.reader import load_recipe

IMAGES = 16


def records(folder):
    """Models and keys of the records by file, of lines that are whole."""
    found = {}
    for file in sorted((folder / "eval/concepts").rglob("*.jsonl")):
        whole = file.read_bytes().split(b"\n")[:-1]
        name = file.relative_to(folder / "eval/concepts")
        found[str(name)] = [(name.parts[0], json.loads(line)["key"]) for line in whole]
    return found


def numbers(folder):
    return json.loads((folder / "eval/concepts.json").read_text())["subsets"]


def test_two_processes_killed_and_resumed_by_one(tmp_path):
    folder, own = merged_with_concepts(tmp_path)
    draw_concepts(tmp_path / "concepts", images=IMAGES)
    recipe = folder / "recipe.yaml"
    shared = Family(tmp_path, command("evaluate", *own, "hardware=ddp_cpu", recipe=recipe, launch=True))
    shared.wait_until(
        lambda: min((len(keys) for keys in records(folder).values()), default=0) >= 3 and len(records(folder)) >= 2
    )
    shared.signal_all(signal.SIGKILL)
    shared.end()
    first = records(folder)
    made = [key for keys in first.values() for key in keys]
    assert {name.split("-")[-1] for name in first} == {"0.jsonl", "1.jsonl"}, "both have worked"
    assert len(made) == len(set(made)) and not (folder / "eval/concepts.json").exists()

    evaluate.run(load_recipe(recipe, own))
    resumed, after = numbers(folder), records(folder)
    assert all(after[name][: len(keys)] == keys for name, keys in first.items()), "what was made is kept"
    every = [key for keys in after.values() for key in keys]
    assert len(every) == len(set(every)) == 2 * (3 * IMAGES + IMAGES), "nothing is made twice"

    shutil.rmtree(folder / "eval")
    printed = run(tmp_path, "evaluate", *own, "hardware=ddp_cpu", recipe=recipe, launch=True)
    assert printed.count("concepts, squares:") == 1, "one process speaks"
    assert numbers(folder) == resumed
    assert len({name for name in records(folder) if name.endswith("-1.jsonl")}) == 4
