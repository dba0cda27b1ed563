# SPDX-License-Identifier: Apache-2.0
"""`import effsam3` makes transformers know the students, in any order of imports, and costs nothing by itself."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import quiet_transformers, read_config
from effsam3.models.image.student import StudentTrunkConfig
from effsam3.models.memory.config import EfficientTrackerConfig

ROOT = Path(__file__).parents[2]


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Run code in a fresh process that finds effsam3, and before it what is in `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# ---- with transformers itself


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, str]:
    """Folders of whole models with random weights: a student's trunk, and with it an efficient memory."""
    config = read_config(chassis_folder("tiny"))
    trunk = StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224)
    for part in (config.detector_config, config.tracker_config):
        part.vision_config.backbone_config = deepcopy(trunk)
    with_memory = deepcopy(config)
    options = with_memory.tracker_config.to_dict()
    del options["model_type"]
    with_memory.tracker_config = EfficientTrackerConfig(**options, memory_global_latents=4, memory_window_latents=16)
    folders = {}
    for name, wanted in {"image": config, "memory": with_memory}.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(0)
        with quiet_transformers():
            Sam3VideoModel(wanted).save_pretrained(folders[name], save_original_format=False)
    return folders


REPORT = """
import json, sys
from transformers import MODEL_MAPPING, AutoConfig
config = AutoConfig.from_pretrained({folder!r})
trunk, tracker = config.detector_config.vision_config.backbone_config, config.tracker_config
found["registered"] = [MODEL_MAPPING[type(part)].__name__ for part in (trunk, tracker)]
found["watching"] = [type(finder).__module__ for finder in sys.meta_path].count("effsam3.registration")
print(json.dumps(found))
"""


def report(code: str, releases: dict[str, str]) -> dict:
    result = python(code + REPORT.format(folder=releases["memory"]))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("registered") == ["StudentTrunk", "EfficientTracker"]
    assert found.pop("watching") == 0
    return found


@pytest.mark.parametrize("first", ["effsam3", "transformers"])
def test_a_release_loads_in_a_fresh_process(releases, first):
    loads = [("image", "Sam3Model"), ("image", "Sam3TrackerVideoModel"), ("memory", "AutoModel")]
    code = f"""
import {first}
import effsam3, transformers
found = {{"loaded": []}}
for slot, name in {loads}:
    model, info = getattr(transformers, name).from_pretrained({releases}[slot], output_loading_info=True)
    wrong = [sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys")]
    found["loaded"].append([type(model).__name__, *wrong])
"""
    loaded = report(code, releases)["loaded"]
    assert loaded == [[name, [], []] for name in ("Sam3Model", "Sam3TrackerVideoModel", "Sam3VideoModel")]


def test_one_of_our_own_modules_may_be_the_first_to_need_transformers(releases):
    assert report("import effsam3.models.memory.attention\nfound = {}\n", releases) == {}


# ---- how imports are watched, with a small package in the place of transformers


@pytest.fixture
def stand_in(tmp_path):
    """Run code with a stand-in for transformers, and modules `effsam3.outer` and `effsam3.inner` that import it."""
    files = {
        "site/transformers/__init__.py": "print('transformers')\n",
        "site/transformers/models.py": "",
        "site/students.py": "import transformers.models\nfrom effsam3.outer import whole\nprint('registered')\n",
        "own/outer.py": "import transformers\nimport effsam3.inner\nwhole = True\nprint('outer')\n",
        "own/inner.py": "print('inner')\n",
    }

    def run(code: str, **changes: str) -> subprocess.CompletedProcess:
        for name, content in (files | changes).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        setting = f"""
import effsam3, effsam3.registration
effsam3.registration.REGISTERING = ("students",)
effsam3.__path__.append({str(tmp_path / "own")!r})
"""
        return python(setting + code, tmp_path / "site")

    return run


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import effsam3.inner", ["inner"]),
        ("import transformers", ["transformers", "inner", "outer", "registered"]),
        ("import transformers.models", ["transformers", "inner", "outer", "registered"]),
        ("import effsam3.outer", ["transformers", "inner", "outer", "registered"]),
        ("import effsam3.outer, transformers, effsam3.inner", ["transformers", "inner", "outer", "registered"]),
        ("import effsam3.inner, students", ["inner", "transformers", "outer", "registered"]),
    ],
)
def test_the_students_are_registered_once_and_when_all_is_whole(stand_in, code, printed):
    result = stand_in(code)
    assert result.stdout.splitlines() == printed, result.stderr


def test_errors_of_our_modules_are_not_swallowed(stand_in):
    code = """
for attempt in range(2):
    try:
        import transformers
    except ImportError as error:
        print(error)
"""
    result = stand_in(code, **{"site/students.py": "raise ImportError('timm is missing')\n"})
    assert result.stdout.splitlines() == ["transformers", "timm is missing"] * 2


def test_what_is_not_there_is_not_found(stand_in):
    assert "No module named 'effsam3.nothing'" in stand_in("import effsam3.nothing").stderr
    # What `python -m` and tools ask of a loader is still there.
    code = "from importlib.util import find_spec; print(find_spec('effsam3.inner').loader.get_source('effsam3.inner'))"
    assert stand_in(code).stdout.startswith("print('inner')")


def test_the_package_alone_is_light():
    heavy = "{'torch', 'transformers', 'timm'}"
    code = f"import sys, effsam3, effsam3.recipe.reader; print(sorted({heavy} & set(sys.modules)))"
    assert python(code).stdout == "[]\n"
