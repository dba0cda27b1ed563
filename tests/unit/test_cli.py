# SPDX-License-Identifier: Apache-2.0
"""The command line: verbs, errors, `launch` as processes, the scripts."""

import ast
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import effsam3
from effsam3 import launch as launcher
from effsam3.cli import main
from effsam3.errors import RecipeError, UserError
from effsam3.hardware.accelerate_configs import read_config
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.verbs import VERBS

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes" / "smoke" / "image.yaml")
ES_RV_M = str(ROOT / "recipes" / "stage1" / "image" / "es_rv_m.yaml")


def run(*arguments, **env):
    """Run a Python process in the repository and return what it did."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def verb_called(monkeypatch):
    """Replace the module of a verb by one that notes the call; return a function that does it."""

    def replace(verb, raises=None):
        calls = []

        def fake_run(recipe, **options):
            calls.append((recipe.name, options))
            if raises is not None:
                raise raises

        module = types.SimpleNamespace(run=fake_run)
        monkeypatch.setitem(sys.modules, f"effsam3.{verb}", module)
        monkeypatch.setattr(effsam3, verb, module, raising=False)
        return calls

    return replace


# ---- errors


def test_an_error_is_two_lines_and_exit_code_2_in_a_real_process():
    result = run("-m", "effsam3.cli", "train", "recipes/smoke/image.yaml", "lr=1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: recipes/smoke/image.yaml:\n  - unknown key lr; did you mean optim.lr? (command line)\n"
    )


def test_scripts_report_errors_alike():
    result = run("scripts/merge.py", "recipes/smoke/imag.yaml")
    assert result.returncode == 2
    assert result.stderr == "error: no recipe at recipes/smoke/imag.yaml; did you mean recipes/smoke/image.yaml?\n"


def test_an_unknown_verb(capsys):
    assert main(["trian", SMOKE]) == 2
    assert capsys.readouterr().err == "error: no verb is called 'trian'; did you mean train?\n"


def test_a_users_mistake_has_no_traceback_anything_else_keeps_it(verb_called, capsys):
    verb_called("train", raises=UserError("the store is empty; embed first"))
    assert main(["train", SMOKE]) == 2
    assert capsys.readouterr().err == "error: the store is empty; embed first\n"
    verb_called("train", raises=ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["train", SMOKE])


def test_recipe_errors_are_said_by_one_rank_others_by_all(verb_called, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", SMOKE, "lr=1"]) == 2
    assert capsys.readouterr().err == ""
    verb_called("train", raises=UserError("disk full"))
    assert main(["train", SMOKE]) == 2
    assert capsys.readouterr().err == "error: disk full\n"


@pytest.mark.parametrize("verb", ["train", "merge", "evaluate", "launch"])
def test_a_missing_recipe_is_all_that_is_asked_for(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--optim.lr 1e-4", "--optim.lr 1e-4: keys of a recipe are given as optim.lr=1e-4, without dashes"),
        ("--optim.lr=1e-4", "--optim.lr=1e-4: keys of a recipe are given as optim.lr=1e-4, without dashes"),
        ("-hardware gpu name=x", "-hardware gpu: keys of a recipe are given as hardware=gpu, without dashes"),
        ("--train.ema name=x", "--train.ema: keys of a recipe are given as train.ema=VALUE, without dashes"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "launch", "show"])
def test_keys_with_dashes_are_answered_with_the_right_spelling(verb, words, answer, capsys):
    assert main([verb, SMOKE, *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {answer}\n"


# ---- verbs


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_a_reader_that_has_gone_is_no_error(words):
    """As in `effsam3 --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as gone:
        done = subprocess.run(
            [sys.executable, "-m", "effsam3", *words], cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_is_the_command():
    result = run("-m", "effsam3", "--version")
    assert (result.returncode, result.stdout) == (0, f"effsam3 {effsam3.__version__}\n")


@pytest.mark.parametrize("verb", ["embed", "train", "merge", "evaluate", "push"])
def test_a_run_folder_stands_for_its_recipe(verb, verb_called, tmp_path, monkeypatch):
    """Also one that was moved, and from any working directory."""
    calls = []
    verb_called(verb)
    sys.modules[f"effsam3.{verb}"].run = lambda recipe, **_: calls.append((recipe.folder, recipe.optim.lr))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/recipe.yaml").write_text(dump_recipe(load_recipe(SMOKE, ["name=before", "optim.lr=3e-4"])))
    assert main([verb, str(tmp_path / "moved")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main([verb, "moved", "optim.lr=5e-4"]) == 0
    assert calls == [(tmp_path / "moved", 3e-4), (tmp_path / "moved", 5e-4)]
    assert main([verb, str(tmp_path)]) == 2  # a folder without a recipe


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"effsam3 {effsam3.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*verb.split(), "--help"])
    assert exited.value.code == 0
    assert f"usage: effsam3 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_the_arguments_of_a_verb_are_those_of_its_function(verb):
    row = VERBS[verb]
    names = {action.dest for action in row.parser(verb)._actions} - {"help", "overrides_by_option"}
    given = ["the recipe"] if row.recipe == "loaded" else []
    names -= {"recipe", "overrides"} if given else set()
    inspect.signature(row.function()).bind(*given, **dict.fromkeys(names))


def test_verbs_of_two_words(capsys):
    assert main(["index"]) == 2
    text = capsys.readouterr().out
    assert main(["index", "--help"]) == 0
    assert capsys.readouterr().out == text
    assert "  index sa1b " in text and "  index sav " in text and "launch" not in text
    assert main(["index", "sa1bb"]) == 2
    assert capsys.readouterr().err == "error: no verb is called 'index sa1bb'; did you mean sa1b?\n"
    assert main(["idnex", "sa1b"]) == 2
    assert capsys.readouterr().err == "error: no verb is called 'idnex'; did you mean index?\n"


@pytest.mark.parametrize("verb", ["train", "merge", "evaluate"])
def test_recipe_verbs_get_the_overridden_recipe(verb, verb_called):
    calls = verb_called(verb)
    assert main([SMOKE, "name=other"], verb=verb) == 0
    assert calls == [("other", {"resume": "auto", "debug": False} if verb == "train" else {})]
    if verb == "train":
        assert main([SMOKE, "--resume", "never"], verb=verb) == 0
        assert calls[1] == ("smoke-image", {"resume": "never", "debug": False})


@pytest.mark.parametrize(
    "argv", [["--check", "3", SMOKE, "name=x"], [SMOKE, "--check", "3", "name=x"], [SMOKE, "name=x", "--check=3"]]
)
def test_embed_check_may_stand_anywhere(argv, verb_called):
    calls = verb_called("embed")
    assert main(["embed", *argv]) == 0
    assert main(["embed", SMOKE]) == 0
    assert calls == [("x", {"check": 3}), ("smoke-image", {"check": None})]


@pytest.mark.parametrize("argv", [["embed", SMOKE, "--check", "0"], ["train", SMOKE, "--check", "3"], ["train"]])
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2


def test_the_number_of_a_function_is_the_exit_code(monkeypatch):
    from effsam3.data.store import tool as store_tool

    monkeypatch.setattr(store_tool, "verify", lambda root: {"somewhere": 1}[str(root)])
    assert main(["store", "verify", "somewhere"]) == 1


# ---- launch


@pytest.fixture
def commands(monkeypatch, clone):
    """Note commands instead of running them; their exit codes are taken from `codes`."""
    noted = types.SimpleNamespace(lines=[], codes=[])

    def fake_run(command, environment):
        noted.lines.append(command)
        return noted.codes.pop(0) if noted.codes else 0

    monkeypatch.setattr(launcher, "_run", fake_run)
    return noted


def test_one_process_needs_no_launcher_and_stays_on_the_cpu(commands):
    assert main(["launch", "recipes/smoke/image.yaml", "train"]) == 0
    assert commands.lines == [[sys.executable, "-m", "effsam3", "train", "recipes/smoke/image.yaml"]]
    assert read_config("cpu").environment == {"ACCELERATE_USE_CPU": "true"}
    assert read_config("gpu").environment == {}


def test_launch_runs_all_verbs_in_order(commands, capsys):
    assert main(["launch", "recipes/smoke/image.yaml", "optim.lr=5e-4", "hardware=ddp_cpu"]) == 0
    config = "accelerate_configs/ddp_cpu.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--module"]
    rest = ["recipes/smoke/image.yaml", "optim.lr=5e-4", "hardware=ddp_cpu"]
    assert commands.lines == [
        [*accelerate, "effsam3", "embed", *rest],
        [*accelerate, "effsam3", "train", *rest],
        [sys.executable, "-m", "effsam3", "merge", *rest],
        [sys.executable, "-m", "effsam3", "evaluate", *rest],
    ]
    assert capsys.readouterr().out.splitlines() == [f"+ {shlex.join(line)}" for line in commands.lines]


def test_launch_stops_at_the_first_failure(commands):
    commands.codes = [0, 75]
    assert main(["launch", SMOKE]) == 75
    assert len(commands.lines) == 2


def test_launch_one_verb_on_the_overridden_hardware(commands):
    assert main(["launch", SMOKE, "train", "hardware=ddp_cpu"]) == 0
    assert len(commands.lines) == 1
    assert "accelerate_configs/ddp_cpu.yaml" in commands.lines[0] and "train" in commands.lines[0]


def test_an_online_teacher_embeds_nothing(commands):
    assert main(["launch", SMOKE, "teacher=online"]) == 0
    assert [line[line.index(SMOKE) - 1] for line in commands.lines] == ["train", "merge", "evaluate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' cannot be launched; did you mean train?"),
        (["lr=1"], "unknown key lr"),
        (["hardware=zero22"], "there is no accelerate_configs/zero22.yaml; did you mean zero2?"),
    ],
)
def test_launch_checks_before_it_starts_anything(arguments, message, commands, capsys):
    assert main(["launch", SMOKE, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert commands.lines == []


def test_exit_codes_come_through():
    assert launcher._run([sys.executable, "-c", "raise SystemExit(3)"], {}) == 3
    assert launcher._run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}) == 137


def test_requests_to_stop_are_passed_on():
    child = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
    child += "print('up', flush=True); signal.pause()"
    parent = f"import sys; from effsam3.launch import _run; sys.exit(_run([sys.executable, '-c', {child!r}], {{}}))"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7


SHIMS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "main(verb=" in path.read_text())


@pytest.mark.parametrize("script", SHIMS)
def test_scripts_are_thin_and_show_a_command_that_exists(script):
    text = (ROOT / "scripts" / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 15
    command = ast.get_docstring(ast.parse(text)).splitlines()[-1].replace("[", "").replace("]", "")
    assert f"scripts/{script}.py" in command
    verb = re.search('main\\(verb="(.+)"\\)', text)[1]
    assert verb in VERBS and verb.split()[0] == script.split("_")[0]
    files = [word for word in shlex.split(command) if re.match("(accelerate_configs|recipes|scripts)/", word)]
    assert files and all((ROOT / word).is_file() for word in files)


def test_run_sh_runs_the_launcher():
    bash = ["bash", str(ROOT / "scripts" / "run.sh")]
    result = subprocess.run(bash, capture_output=True, text=True)
    assert result.returncode == 2
    assert "bash scripts/run.sh RECIPE" in result.stderr


def test_recipe_errors_are_user_errors():
    assert issubclass(RecipeError, UserError) and issubclass(UserError, ValueError)
