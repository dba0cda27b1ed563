# SPDX-License-Identifier: Apache-2.0
"""The layers of the package, read from its import statements: nothing reaches up, and light modules stay light."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "effsam3"

# The lowest layer first. A module may import those of lower layers and, except among the verbs, of its own. An entry
# is a module or a folder; the longest one that fits a module counts.
LAYERS = [
    {  # light: no torch, so that recipes can be checked and shown at once
        "__init__",
        "errors",
        "files",
        "hub",
        "checked_files",
        "stopping",
        "shipped",
        "extras",
        "recipe",
        "hardware.accelerate_configs",
        "training.report",
        "training.progress",
        "training.monitor",
        "training.checkpoint_folders",
        "training.state",
        "stages.__init__",
        "stages.image.facts",
        "stages.vision.facts",
        "stages.text.facts",
        "stages.memory.facts",
        "stages.video.facts",
        "stages.adapt.facts",
        "stages.prompted.facts",
        "stages.concepts.facts",
        "models.lora.parts",
        "stages.release.facts",
        "data.store.format",
        "models.registry",
        "models.chassis.card",
        "models.chassis.sizes",
        "models.chassis.tiny",
        "models.chassis.tiny_concepts",
        "models.image.separable",
        "models.chassis.foreign",
        "models.image.backbones",  # asks timm, but only about a student timm/NAME
        "models.inference.prompt_options",
        "models.memory.token_counts",
        "models.flops",
    },
    {"auto", "models", "data", "losses", "training", "tensor_files", "hardware.accelerator"},
    {
        "inputs",
        "predictor",
        "stages",
        "benchmarks",
        "publish",
        "hardware.budget",
        "training.resume",
        "training.not_finite",
        "training.debug_run",
        "training.validation",
        "training.curves",
    },
    {
        "embed",
        "train",
        "merge",
        "evaluate",
        "demo",
        "predict",
        "export",
        "profile",
        "push",
        "data_check",
        "data_convert",
        "import_student",
        "inspect_model",
        "show",
        "new",
        "compare",
        "status",
        "plot",
        "leaderboard",
        "report",
        "zoo",
        "launch",
    },
    {"cli", "verbs", "data_verbs", "verb"},
    {"__main__"},
]
VERBS = LAYERS[3]
READS_RECIPES = {"recipe", "stages"}
FORBIDDEN = {"sam3"}  # SAM 3 is used through transformers; its own package has another licence and pins old versions


def modules():
    """Return the package's files by dotted name without `effsam3.`."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return files


def imports(file, top_level_only=False):
    """Return the dotted names of everything a file imports when it runs, `from a import b` as a.b."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(file, files):
    """Return which of the package's modules a file imports."""
    found = set()
    for name in imports(file):
        if name.split(".")[0] == "effsam3":
            inner = name.removeprefix("effsam3").removeprefix(".")
            while inner and inner not in files:  # `from effsam3.recipe.reader import load_recipe` is the module recipe
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


def unit(module):
    """Return the entry of LAYERS that a module belongs to: itself, or the innermost folder that is listed."""
    listed = set().union(*LAYERS)
    if f"{module}.__init__" in listed:
        return f"{module}.__init__"
    while module and module not in listed:
        module = module.rpartition(".")[0]
    return module


def room(module):
    """Return the folder or module at the package's top level."""
    return module.split(".")[0]


def layer(module):
    """Return the number of the layer; a folder's `__init__.py` holds no code, so it is of the lowest one."""
    if is_empty(module):
        return 0
    assert unit(module), f"effsam3.{module} has no place in LAYERS"
    return next(number for number, units in enumerate(LAYERS) if unit(module) in units)


def is_empty(module):
    """Return whether a module is an `__init__.py` with a docstring only."""
    file = PACKAGE.joinpath(*module.split("."), "__init__.py")
    return file.is_file() and len(ast.parse(file.read_text(encoding="utf-8")).body) <= 1


def mistakes(module, imported):
    """Yield what is wrong with one import inside the package."""
    mine, theirs = room(module), room(imported)
    if layer(imported) > layer(module):
        yield f"{module} (layer {layer(module)}) imports {imported} (layer {layer(imported)})"
    if mine in VERBS and theirs in VERBS and mine != theirs:
        yield f"verb {module} imports verb {imported}; verbs meet only through files"
    if {mine, theirs} == {"models", "data"}:
        yield f"{module} imports {imported}; models and data do not know each other"
    if layer(module) == 1 and theirs in READS_RECIPES and not is_empty(imported):
        yield f"{module} imports {imported}; it takes plain arguments, never a recipe"


def test_nothing_reaches_up():
    files = modules()
    assert len(files) > 15
    found = [
        m for module, file in files.items() for other in own_imports(file, files) for m in mistakes(module, other)
    ]
    assert found == []


def test_no_circles():
    files = modules()
    graph = {module: own_imports(file, files) - {module} for module, file in files.items()}
    # Take away what imports nothing that is left; circles and what leads to them remain.
    while free := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in free}
    assert graph == {}


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("recipe.reader", "models.image.student"),
        ("data.store.reader", "models.image.student"),
        ("models.chassis.tensors", "data.transforms"),
        ("models.image.student", "recipe.reader"),
        ("losses.features", "stages.image.facts"),
        ("data.images.sa1b", "stages.image.training"),
        ("train", "embed"),
        ("stages.image.training", "train"),
        ("show", "cli"),
    ],
)
def test_the_rules_can_fail(module, imported):
    assert list(mistakes(module, imported))


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("recipe.rules", "models.registry"),
        ("data.store.reader", "errors"),
        ("stages.image.training", "recipe.reader"),
        ("train", "stages"),
        ("cli", "train"),
    ],
)
def test_the_rules_can_pass(module, imported):
    assert not list(mistakes(module, imported))


def test_the_lowest_layer_needs_only_python_and_yaml():
    allowed = set(sys.stdlib_module_names) | {"yaml", "effsam3"}
    files = modules()
    found = {
        (module, name)
        for module, file in files.items()
        if layer(module) == 0
        for name in imports(file, top_level_only=True)
        if name.split(".")[0] not in allowed
    }
    assert found == set()


def test_the_command_line_imports_verbs_only_when_they_run():
    for file in ("cli.py", "verbs.py", "data_verbs.py", "verb.py"):
        top = imports(PACKAGE / file, top_level_only=True)
        light = {"errors", "stopping", "__version__", "verbs", "data_verbs", "verb"}
        assert {name.split(".")[1] for name in top if name.startswith("effsam3.")} <= light


def test_nobody_imports_forbidden_packages():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    found = {(str(file), name) for file in files for name in imports(file) if name.split(".")[0] in FORBIDDEN}
    assert found == set()


def test_nothing_depends_on_pythons_hash():
    """Its values are promised for one process alone; what is drawn or stored needs the same ones on every machine."""
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        calls = [
            node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "hash"], file


def test_every_file_says_its_licence_and_what_it_is():
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "setup.py"]:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), file
        assert text.isascii(), file
        body = ast.parse(text)
        assert ast.get_docstring(body) or not body.body, f"{file} has no docstring"
