# SPDX-License-Identifier: Apache-2.0
"""`show` and other light verbs: right numbers without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effsam3.cli import main
from effsam3.data.store.format import Field, Manifest
from effsam3.errors import UserError
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.registry import SAM3
from effsam3.recipe.reader import load_recipe
from effsam3.show import show

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes" / "smoke" / "image.yaml")
ES_RV_M = str(ROOT / "recipes" / "stage1" / "image" / "es_rv_m.yaml")
HEAVY = ["torch", "numpy", "transformers", "timm", "datasets", "accelerate", "pyarrow", "PIL"]
SHOWN = [["show", ES_RV_M], ["show", str(ROOT / "recipes" / "stage2" / "memory.yaml")]]


def run(code):
    """Run Python code in a process of its own and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)


@pytest.mark.parametrize("argv", [*SHOWN, ["compare"], ["compare", "--json"], ["--help"]])
def test_light_verbs_import_nothing_heavy(argv):
    code = f"import sys; from effsam3.cli import main; main({argv!r}); print(sorted(set({HEAVY}) & set(sys.modules)))"
    assert run(code).splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing():
    code = "import sys, effsam3; print(sorted(m for m in sys.modules if m.startswith('effsam3')))"
    assert run(code) == "['effsam3']\n"


def test_what_show_prints_is_the_recipe(capsys, tmp_path):
    assert main(["show", ES_RV_M, "optim.lr=5e-4"]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(copy) == load_recipe(ES_RV_M, ["optim.lr=5e-4"])


def test_show_derives_numbers(tmp_path):
    report = tmp_path / "photos.report.json"
    report.write_text(json.dumps({"images": {"train": 100_000, "val": 11_000}}))
    recipe = load_recipe(ES_RV_M, [f"data.index={tmp_path}/photos.parquet"])
    rows = dict(line[2:].split(maxsplit=1) for line in show(recipe).splitlines() if line.startswith("#"))
    assert rows["hardware"].endswith("accelerate_configs/zero2.yaml, processes: 8")
    assert rows["batch"] == "512 = 16 per process x 8 (processes) x 4 (accumulated)"
    assert rows["images"] == "100,000 to learn from, 11,000 held out"
    assert rows["length"] == "9,766 steps = 50.0 epochs, 977 steps of them warm-up"
    assert rows["student"].startswith("7,774,864 trunk + 1,675,008 fused head = 9,449,872 parameters, 97.88 % fewer")
    assert rows["store"] == "10,616,832 bytes per image (1024 x 72 x 72 float16), 1,178.47 GB in all"
    limited = load_recipe(ES_RV_M, [f"data.index={tmp_path}/photos.parquet", "data.limit=20_000"])
    assert "# images    20,000 to learn from, 11,000 held out" in show(limited)
    for damage in ("{", "[]", '{"images": {"train": "many"}}', '{"images": 3}'):
        report.write_text(damage)
        assert f"# images    unknown yet: {report} is damaged" in show(recipe)


def test_show_says_what_is_not_there_yet():
    text = show(load_recipe(ES_RV_M, ["data.index=nowhere/x.parquet", "sam3.checkpoint=someone/sam3"]))
    command = "effsam3 index sa1b FOLDER --out nowhere/x.parquet"
    assert f"# images    unknown yet: no nowhere/x.report.json; make it with: {command}" in text
    assert "# store     unknown yet: sam3.checkpoint: the sizes of 'someone/sam3' are not known" in text
    assert "# store     none" in show(load_recipe(SMOKE, ["teacher=online"]))


def test_show_refuses_a_batch_that_the_hardware_cannot_divide(capsys):
    assert main(["show", SMOKE, "hardware=zero2"]) == 2
    assert "(8) is not a multiple of micro_batch_size x world size (4 x 8 = 32)" in capsys.readouterr().err


def test_show_one_key(capsys):
    assert main(["show", ES_RV_M, "--key", "hardware"]) == 0
    assert main(["show", SMOKE, "--key", "train.loggers", "train.loggers=[tensorboard]"]) == 0
    assert capsys.readouterr().out == "zero2\ntensorboard\n"
    assert main(["show", SMOKE, "--key", "train.loggrs"]) == 2
    assert "did you mean train.loggers?" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["tiny", "random"])
@pytest.mark.parametrize("tap", ["trunk", "neck"])
@pytest.mark.parametrize("pixels", ["true", "false"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("grid", ["null", "8"])
def test_record_bytes_are_the_stores(checkpoint, tap, pixels, dtype, grid):
    embed = f"{{tap: {tap}, pixels: {pixels}, dtype: {dtype}, grid: {grid}}}"
    recipe = load_recipe(SMOKE, [f"sam3.checkpoint={checkpoint}", f"embed={embed}"])
    facts = sam3_of(checkpoint).sizes
    side = recipe.embed.grid or facts.grid
    channels = facts.hidden_size if tap == "trunk" else facts.fpn_hidden_size
    fields = [Field("features", dtype, (channels, side, side))]
    if dtype == "int8":
        fields += [Field("scale", "float32", (channels,))]
    if recipe.embed.pixels:
        fields += [Field("pixels", "uint8", (3, facts.image_size, facts.image_size)), Field("sizes", "int32", (2,))]
    assert recipe.derived()["store"]().startswith(f"{Manifest(tuple(fields), {}).stride:,} bytes per image")


def test_facts_of_a_local_folder(tmp_path):
    config = {"image_size": 1008, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4736}
    backbone = {**config, "num_hidden_layers": 32, "pretrain_image_size": 336}
    vision = {"fpn_hidden_size": 256, "backbone_config": backbone}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "sam3_video", "detector_config": {"vision_config": vision}})
    )
    assert sam3_of(str(tmp_path)).sizes == SAM3.sizes
    assert (SAM3.sizes.grid, SAM3.sizes.trunk_params) == (72, 446_236_672)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"is not of a SAM 3 .*detector_config is missing"):
        sam3_of(str(tmp_path))
