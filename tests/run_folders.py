# SPDX-License-Identifier: Apache-2.0
"""Run folders as `train` leaves them, with students of random weights, and what the real verb merges of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from effsam3 import merge
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import TRUNK, fingerprint, read_config, read_tensors
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.memory.slot import MEMORY, tracker_config
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS
from effsam3.models.merging.slots import SLOTS
from effsam3.models.text.student import TEXT_ENCODER, TEXT_PROJECTION, text_student
from effsam3.models.vision.slot import build_vision_student
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.training import checkpoint

RECIPES = Path(__file__).parents[1] / "recipes"


def sure_chassis(folder: Path) -> Path:
    """The tiny chassis in a folder, but one that takes every object for present: else all its masks would be empty."""
    shutil.copytree(chassis_folder("tiny"), folder)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder).items()}
    tensors["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"].fill_(5.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def image_run(
    runs: Path,
    name: str = "image",
    student: str = "tiny_convnext",
    head: str = "fused",
    seen: int | None = None,
    chassis: str = "tiny",
    side: int | None = None,
    **facts,
) -> Path:
    """A run of stage image on a small chassis; `facts` replace what the provenance says of the features.

    `side` is the recipe's `image_size`, `seen` its `student_image_size`.
    """
    asked = [f"name={name}", f"student={student}", f"head={head}", f"train.runs={runs}", f"sam3.checkpoint={chassis}"]
    asked += [f"student_image_size={seen or 'null'}", f"image_size={side or 'null'}"]
    recipe = load_recipe(RECIPES / "smoke/image.yaml", asked)
    trunk, sizes = tiny_trunk(student, head, seen, chassis), sam3_of(chassis).sizes
    teacher = fingerprint(read_tensors(chassis_folder(chassis), TRUNK))
    own = {"tap": "trunk", "grid": sizes.grid, "channels": sizes.hidden_size, "image_size": sizes.image_size}
    own["teacher"] = {"fingerprint": teacher}
    return _write(recipe, own | facts, trunk.state_dict())


def vision_run(runs: Path, name: str = "vision", student: str = "tiny_convnext") -> Path:
    """A run of stage vision on the tiny chassis."""
    asked = [f"name={name}", f"student={student}", "widths=[16,4,8,12]", f"train.runs={runs}", "sam3.checkpoint=tiny"]
    recipe, sizes = load_recipe(RECIPES / "smoke/vision.yaml", asked), sam3_of("tiny").sizes
    torch.manual_seed(3)
    encoder = read_config(chassis_folder("tiny")).detector_config.vision_config
    weights = shaken(build_vision_student(encoder, student, recipe.widths, None)).state_dict()
    teacher = {"fingerprint": fingerprint(_tiny_tensors(*SLOTS["vision"].owns))}
    return _write(recipe, {"image_size": sizes.image_size, "teacher": teacher}, weights)


def text_run(
    runs: Path, name: str = "text", student: str = "tiny_text_plain", padding: str = "masked", **facts
) -> Path:
    """A run of stage text on the tiny chassis."""
    own = [f"name={name}", f"student={student}", f"student_padding={padding}", f"train.runs={runs}"]
    recipe = load_recipe(RECIPES / "smoke/text.yaml", own)
    teacher = fingerprint(_tiny_tensors(TEXT_ENCODER, TEXT_PROJECTION))
    facts = {"tap": "text", "channels": 128, "teacher": {"fingerprint": teacher}} | facts
    return _write(recipe, facts, tiny_text(student, padding).state_dict())


def memory_run(runs: Path, name: str = "memory", trains: tuple[str, ...] = ("memory",)) -> Path:
    """A run of stage memory on the tiny chassis; `trains` are the parts of the tracker that it trained."""
    own = [f"name={name}", "sam3.checkpoint=tiny", f"memory.trains=[{','.join(trains)}]", f"train.runs={runs}"]
    recipe = load_recipe(RECIPES / "smoke/memory.yaml", own)
    torch.manual_seed(2)
    config = tracker_config(read_config(chassis_folder("tiny")).tracker_config, recipe.memory)
    prefixes = tuple(prefix for part in trains for prefix in PARTS[part])
    tensors = shaken(EfficientTracker(config)).state_dict()
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return _write(recipe, {"teacher": {"fingerprint": fingerprint(_tiny_tensors(*MEMORY))}}, weights)


RUNS = {"image": image_run, "vision": vision_run, "text": text_run, "memory": memory_run}


def merged_run(runs: Path, *stages: str) -> Path:
    """Merge a run of one stage, or a release of several; returns the run folder, or the release's."""
    folders = {stage: RUNS[stage](runs, f"smoke-{stage}") for stage in stages}
    if len(stages) == 1:
        recipe = load_recipe(folders[stages[0]] / "recipe.yaml")
    else:
        parts = [f"parts.{stage}={folders.get(stage, 'null')}" for stage in RUNS]
        own = [f"runs={runs}", "merge.formats=[transformers]", *parts]
        recipe = load_recipe(RECIPES / "smoke/release.yaml", own)
    return merge.run(recipe).parent


# ---- students


def tiny_trunk(
    student: str = "tiny_convnext", head: str = "fused", seen: int | None = None, chassis: str = "tiny"
) -> StudentTrunk:
    """A student for a small chassis, in eval mode, with statistics of its own and BatchNorm that does something."""
    torch.manual_seed(0)
    sizes = {name: getattr(sam3_of(chassis).sizes, name) for name in ("hidden_size", "image_size", "patch_size")}
    return shaken(StudentTrunk(student_config(student, head, seen, **sizes)))


def tiny_text(student: str = "tiny_text_plain", padding: str = "masked"):
    """A text student for the tiny chassis, as `tiny_trunk`."""
    torch.manual_seed(1)
    return shaken(text_student(student, 32, 128, padding))


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Give every statistic and every parameter that would be zero or one some value of its own."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.rand_like(tensor) * 0.2
            tensor.data += noise + 0.3 if name.endswith(("running_var", "feature_scale")) else noise - 0.1
    return model.eval()


def _tiny_tensors(*prefixes: str) -> dict[str, torch.Tensor]:
    tensors = read_tensors(chassis_folder("tiny"))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def _write(recipe, facts: dict, weights: dict) -> Path:
    folder = recipe.folder
    step = folder / "checkpoints" / "best-step-000007"
    step.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "provenance.json").write_text(json.dumps({"features": facts}))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, step / checkpoint.WEIGHTS)
    (step / "trainer.json").write_text(json.dumps({"step": 7, "best": {"step": 7, "val/cosine": 0.5}}))
    return folder
