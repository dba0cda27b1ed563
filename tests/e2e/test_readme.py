# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs tell people to type: run here or by another test, or at least read as it would be."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import REPOSITORY
from libraries import EXTRAS

from effsam3 import launch
from effsam3.cli import below, main, split
from effsam3.extras import refuse_missing_extras
from effsam3.recipe.reader import dump_recipe, load_recipe, refuse_verb
from effsam3.verbs import VERBS

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of every bash block, as words, and the document that it is in."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            words = [shlex.split(line, comments=True) for line in lines]
            found += [(document.name, line) for line in words if line]
    return found


def test_every_file_that_is_named_exists():
    words = {word for _, command in commands() for word in command}
    named = {word for word in words if re.match(r"(scripts|recipes|accelerate_configs)/\S+\.\w+$", word)}
    assert len(named) >= 8
    for document in DOCUMENTS:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
        named |= {str((document.parent / link).resolve().relative_to(REPOSITORY)) for link in links}
    assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()]


# ---- every command: run here, run by another test, or, where it takes weights, data or machines, read

SECONDS = ("show", "compare", "recipes", "new")  # verbs that are run here, as they stand
MINUTES = {"--budget", "--device-gib"}  # unless asked for this: unit/test_estimates.py does, of small students
# Pages whose commands another test runs, all of them.
RUN_BY_PAGE = {
    "own_data.md": ("e2e/test_own_data.py", "def test_the_page_from_beginning_to_end"),
    "predict.md": ("unit/test_predict_inputs.py", "def test_every_line_of_the_document_runs"),
}
# Recipes for a CPU, and the test that takes each through its verbs, or why there is none.
RUN_BY_RECIPE = {
    "smoke/image": "e2e/test_pipeline.py",
    "smoke/vision": "e2e/test_vision.py",
    "smoke/text": "e2e/test_text.py",
    "smoke/lora": "e2e/test_adapt.py",
    "smoke/memory": "e2e/test_memory_training.py",
    "smoke/tiny_teacher": "e2e/test_memory_training.py",
    "smoke/tiny_teacher_clips": "the same on longer clips, for many minutes",
    "smoke/tiny_teacher_long": "the same on longer clips, for many minutes",
}
# What cannot be run here takes weights, data, a network, a webcam, GPUs or several machines.
READ = (
    "launch", "embed", "train", "merge", "evaluate", "push", "predict", "import", "inspect", "export", "profile",
    "demo", "index sa1b", "index sav", "fetch recap", "extract frames", "store import", "data check", "data convert",
)  # fmt: skip
# Other programs. What of ours they are told to run is read.
OTHERS = ("git", "source", "pip", "hf", "sbatch", "accelerate", "python", "bash", "for", "ssh", "done", "wait")
MADE_UP = ("evaluate.benchmarks=[norms]", "shouting")  # names that docs/extending.md adds to the code first


def as_verb(words: list[str]) -> list[str]:
    """Return a line as the words after `effsam3` that mean the same, [] if it runs no verb."""
    if words[0] == "ssh":
        words = shlex.split(words[2].partition("&&")[2].partition(">")[0].replace("$rank", "0"))
    if Path(words[0]).name == "effsam3":
        return words[1:]
    script = next((word for word in words if word.startswith("scripts/")), "")
    rest = words[words.index(script) + 1 :] if script else []
    if script in ("scripts/run.sh", "scripts/sbatch.sh"):
        return ["launch", *rest]
    return [Path(script).stem, *rest] if script.endswith(".py") else []


LINES = [(page, verb) for page, words in commands() if (verb := as_verb(words))]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The folder of somebody who has followed the documents: a clone's recipes, own ones, runs that have begun."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("accelerate_configs", "recipes"):
        shutil.copytree(REPOSITORY / name, folder / name)
    run = load_recipe(REPOSITORY / "recipes/stage1/image/es_rv_m.yaml")
    (folder / run.folder).mkdir(parents=True)
    (folder / run.folder / "recipe.yaml").write_text(dump_recipe(run))
    return folder


@pytest.fixture
def here(reader, monkeypatch) -> None:
    """In that folder, and whatever `launch` would start has done its work."""
    monkeypatch.chdir(reader)
    monkeypatch.setattr(launch, "_run", lambda command, environment: 0)
    monkeypatch.setattr(launch, "ask_for_needs", lambda *_: 0)


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {shlex.join(line)}" for page, line in LINES])
def test_every_command_is_understood(here, page, line, capsys):
    """Its options, its recipe and every key; `launch` also what it would start, on as many machines."""
    verb, rest = split(line)
    assert verb in SECONDS + READ, f"{verb}: name it above, where it is run, or why it is only read"
    row = VERBS[verb]
    parse = row.parser(verb).parse_intermixed_args if row.recipe else row.parser(verb).parse_args
    options = vars(parse(rest))
    own = Path(rest[0]) if row.recipe else None
    if own is not None and own.parent == Path() and own.suffix == ".yaml" and not own.exists():
        assert main(["new", own.stem, "--from", "adapt/video_frames"]) == 0  # as the page has told to
    if verb == "new":
        Path(f"{rest[0]}.yaml").unlink(missing_ok=True)
    if any(word in MADE_UP for word in rest):
        assert page == "extending.md"
    elif verb in (*SECONDS, "launch") and not MINUTES & set(rest):
        assert main(line) == 0, capsys.readouterr().err
    elif row.recipe:
        recipe = load_recipe(options["recipe"], [*options["overrides"], *(options.get("overrides_by_option") or [])])
        refuse_verb(recipe, verb)
        refuse_missing_extras(recipe, [verb])


def test_what_is_said_to_be_run_elsewhere_is():
    tests = REPOSITORY / "tests"
    for page, (test, function) in RUN_BY_PAGE.items():
        text = (tests / test).read_text()
        assert page in text and function in text, test
    smoke = {re.sub(r"^recipes/|\.yaml$", "", word) for _, line in LINES for word in line if "smoke/" in word}
    smoke = {name for name in smoke if name.startswith("smoke/")} - {"smoke/video"}  # of own_data.md
    assert smoke == RUN_BY_RECIPE.keys()
    for recipe, test in RUN_BY_RECIPE.items():
        if test.endswith(".py"):
            assert re.search(rf"\b{recipe.partition('/')[2]}\b", (tests / test).read_text()), test


def test_other_programs_are_known_and_given_what_there_is():
    lines = [words for _, words in commands() if words[0] != "effsam3"]
    assert {words[0] for words in lines} == set(OTHERS)
    for word in (word for words in lines for word in words):
        for extra in re.findall(r"\[([a-z,]+)\]$", word) if word.startswith(("effsam3[", ".[")) else ():
            assert extra in EXTRAS, word


def test_every_verb_that_is_spoken_of_exists():
    """Also within sentences."""
    spoken = {
        words for page in DOCUMENTS for words in re.findall(r"`effsam3 ([a-z]+(?: [a-z0-9]+)?)", page.read_text())
    }
    assert len(spoken) > 20
    assert not [words for words in spoken if split(words.split())[0] not in VERBS and not below(words.split()[0])]


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
