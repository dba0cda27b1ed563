# SPDX-License-Identifier: Apache-2.0
"""`import effsam3.auto` makes transformers know the students, in any order of imports."""

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
print(json.dumps(found))
"""


def report(code: str, releases: dict[str, str]) -> dict:
    result = python(code + REPORT.format(folder=releases["memory"]))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("registered") == ["StudentTrunk", "EfficientTracker"]
    return found


@pytest.mark.parametrize("first", ["effsam3.auto", "transformers"])
def test_a_release_loads_in_a_fresh_process(releases, first):
    loads = [("image", "Sam3Model"), ("image", "Sam3TrackerVideoModel"), ("memory", "AutoModel")]
    code = f"""
import {first}
import effsam3.auto, transformers
found = {{"loaded": []}}
for slot, name in {loads}:
    model, info = getattr(transformers, name).from_pretrained({releases}[slot], output_loading_info=True)
    wrong = [sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys")]
    found["loaded"].append([type(model).__name__, *wrong])
"""
    loaded = report(code, releases)["loaded"]
    assert loaded == [[name, [], []] for name in ("Sam3Model", "Sam3TrackerVideoModel", "Sam3VideoModel")]


def test_whoever_reads_a_config_with_effsam3_needs_no_import(releases):
    code = "from pathlib import Path; from effsam3.models.chassis.tensors import read_config\n"
    code += f"read_config(Path({releases['memory']!r}))\nfound = {{}}\n"
    assert report(code, releases) == {}


def test_the_package_alone_is_light():
    heavy = "{'torch', 'transformers', 'timm'}"
    code = f"import sys, effsam3, effsam3.recipe.reader; print(sorted({heavy} & set(sys.modules)))"
    assert python(code).stdout == "[]\n"
