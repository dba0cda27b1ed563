# SPDX-License-Identifier: Apache-2.0
"""A stage's loss without weights, data or a device: what a micro-batch allocates and computes.

Fake tensors have shapes and no contents. The stage's own loss runs forward and backward on them while a ledger follows
every allocation and product, so what is counted is what the code does, frozen parts and recomputing among it.

Letters: B samples of a micro-batch, T frames, N objects, L tokens, C channels, G side of a grid, S image side.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effsam3.models.chassis.tiny import full_config, tiny_config
from effsam3.models.registry import chassis_facts

# ---- what allocates, without allocating


class Ledger(TorchDispatchMode):
    """Follows what is allocated, `now` and at most (`peak`), in bytes, and the floating-point operations.

    `flops` are those of matrix products and convolutions only, as is usual. Real tensors stay real, fake ones fake.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.in_backward = False
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if isinstance(arguments[0] if arguments else None, FakeTensor):
            if function is torch.ops.aten._local_scalar_dense.default:
                return True  # a question that only contents could answer: the larger of both ways is taken
            if function is torch.ops.aten.index.Tensor:  # which are wanted is known, what they hold is not
                arguments = (arguments[0], [_numbers(index) for index in arguments[1]])
        result = function(*arguments, **(options or {}))
        if (formula := flop_registry.get(function.overloadpacket)) is not None:
            self.add_flops(formula(*arguments, **(options or {}), out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.now -= size

    def add_flops(self, count: int) -> None:
        """Count operations, but not those of a forward that is done again: backward itself runs without autograd."""
        if not (self.in_backward and torch.is_grad_enabled()):
            self.flops += count


def _numbers(index: Tensor | None) -> Tensor | None:
    mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero()[:, 0] if mask else index


class _FusedAttention(torch.autograd.Function):
    """What CUDA's fused attention keeps. The CPU's takes no dropout and no learned mask, and would keep all scores."""

    @staticmethod
    def forward(ctx, query, key, value, mask, ledger):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), mask)
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _, mask = ctx.saved_tensors
        for_query, for_key, for_value, for_mask, _ = ctx.needs_input_grad
        scores = query.shape[:-1].numel() * key.shape[-2]
        widths = query.shape[-1] * (for_query + for_key)
        widths += value.shape[-1] * (for_value + (for_query or for_key or for_mask))
        ctx.ledger.add_flops(2 * scores * widths)
        grad_mask = None
        if for_mask:
            grad_mask = query.new_empty(*query.shape[:-1], key.shape[-2]).to(mask.dtype).sum_to_size(mask.shape)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask, None


@contextmanager
def fused_attention(ledger: Ledger) -> Iterator[None]:
    """Let attention allocate what CUDA's fused one does, and the ledger count its products."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        scores = query.shape[:-1].numel() * key.shape[-2]
        ledger.add_flops(2 * scores * (query.shape[-1] + value.shape[-1]))
        return _FusedAttention.apply(query, key, value, attn_mask, ledger)

    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


# ---- the stages without weights and data


@dataclass(frozen=True)
class Dry:
    """A stage whose floating-point tensors have no contents."""

    stage: Any
    student: nn.Module
    frozen: list[nn.Module]  # what stands beside the student
    batch: dict[str, Any]


def dry_stage(recipe: Any, samples: int) -> Dry:
    """Build the stage of a recipe and a micro-batch of so many samples, without weights and data."""
    return MAKE[recipe.stage](recipe, samples, FakeTensorMode(allow_non_fake_inputs=True))


def _empty(fake: FakeTensorMode, module: nn.Module) -> nn.Module:
    """Give a module that was built on `meta` fake tensors."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):  # CUDA's autocast computes it in float32, the CPU's does not
            part.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    with fake:
        return module.to_empty(device="cpu")


def _stage(cls: type, recipe: Any, **attributes) -> Any:
    """A stage with the attributes that its loss reads; its `__init__` would read weights and data."""
    stage = cls.__new__(cls)
    device = torch.device("cpu")
    bf16 = recipe.train.precision == "bf16"
    autocast = SimpleNamespace(device=device, autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    stage.__dict__.update(attributes, recipe=recipe, device=device, accelerator=autocast)
    return stage


def _config(checkpoint: str) -> Any:
    """The chassis' config: a local folder's own, else by its published sizes.

    Raises:
        UserError: the sizes are not known.
    """
    from effsam3.models.chassis.tensors import read_config

    for folder in (Path(checkpoint) / "merged", Path(checkpoint)):
        if (folder / "config.json").is_file():
            return read_config(folder)
    if checkpoint == "tiny":
        return tiny_config()
    chassis_facts(checkpoint)  # it knows which names are of SAM 3's sizes
    return full_config()


def _image(recipe: Any, samples: int, fake: FakeTensorMode) -> Dry:
    from effsam3.models.image.teacher import Neck, Teacher
    from effsam3.stages.image.training import ImageStage, make_student

    facts, tap, int8 = chassis_facts(recipe.sam3.checkpoint), recipe.embed.tap, recipe.embed.dtype == "int8"
    side, grid = facts.image_size, recipe.embed.grid or facts.grid
    channels = facts.hidden_size if tap == "trunk" else facts.fpn_hidden_size
    teacher, neck, frozen = None, None, []
    with torch.device("meta"):
        student = make_student(replace(recipe, student_init="random"), channels, side, facts.patch_size)
        if recipe.teacher == "online" or recipe.loss.neck:
            config = _config(recipe.sam3.checkpoint).detector_config.vision_config
            neck = Neck(config) if recipe.loss.neck else None
        if recipe.teacher == "online":
            teacher = Teacher(config, tap, recipe.embed.grid)
            frozen.append(_empty(fake, teacher))
    if recipe.loss.neck:
        frozen.append(_empty(fake, neck))
    with fake:
        statistics = {"mean_C": torch.zeros(channels), "deviation_C": torch.ones(channels)}
        batch = {"pixels": torch.zeros(samples, 3, side, side, dtype=torch.uint8)}
        if teacher is None:
            dtype = torch.int8 if int8 else torch.float16
            batch["features"] = torch.zeros(samples, channels, grid, grid, dtype=dtype)
            batch |= {"scale": torch.zeros(samples, channels)} if int8 else {}
    batch["sizes"] = torch.full((samples, 2), side)
    facts = {"grid": grid, "image_size": side}
    stage = _stage(ImageStage, recipe, facts=facts, teacher=teacher, neck=neck, **statistics)
    return Dry(stage, _empty(fake, student), frozen, batch)


def _text(recipe: Any, samples: int, fake: FakeTensorMode) -> Dry:
    from effsam3.models.text.student import TextTeacher
    from effsam3.stages.text.training import TextStage, make_student

    channels, length = chassis_facts(recipe.sam3.checkpoint).fpn_hidden_size, recipe.data.context_length
    teacher, frozen = None, []
    with torch.device("meta"):
        student, _ = make_student(replace(recipe, student_init="random"), channels)
        if recipe.teacher == "online":
            config = _config(recipe.sam3.checkpoint).detector_config
            teacher = TextTeacher(config)
            frozen.append(_empty(fake, teacher))
    with fake:
        statistics = {"mean_C": torch.zeros(channels), "deviation_C": torch.ones(channels)}
        features = torch.zeros(samples, length, channels, dtype=torch.float16)
    # Real: the teacher runs on different texts only, and these are all different.
    ids = torch.arange(samples * length).reshape(samples, length) % 49_000
    batch = {"ids": ids, "mask": torch.ones(samples, length, dtype=torch.bool), "features": features}
    batch["counts"] = torch.ones(samples, dtype=torch.bool)
    stage = _stage(TextStage, recipe, teacher=teacher, **statistics)
    return Dry(stage, _empty(fake, student), frozen, batch)


def _memory(recipe: Any, samples: int, fake: FakeTensorMode) -> Dry:
    from effsam3.models.memory.slot import tracker_config
    from effsam3.models.memory.tracker import EfficientTracker
    from effsam3.stages.memory.training import MemoryStage, make_student

    own, asked = _config(recipe.sam3.checkpoint).tracker_config, recipe.memory
    dense = replace(asked, mode="dense", attention_layers=None, fuser_layers=None)
    with torch.device("meta"):
        tracker = EfficientTracker(tracker_config(own, asked))
        teacher = EfficientTracker(tracker_config(own, dense), remove_vision_encoder=True)
    tracker, teacher = _empty(fake, tracker), _empty(fake, teacher).eval().requires_grad_(False)
    side, frames, objects = tracker.image_size, recipe.data.frames, recipe.data.objects
    student = make_student(recipe, tracker, teacher)
    # Real: masks and prompts decide what is run. As many objects as a clip may have, present in every frame.
    masks = torch.zeros(samples, frames, objects, side, side, dtype=torch.bool)
    masks[..., : side // 2, : side // 2] = True
    with fake:
        pixels = torch.zeros(samples, frames, 3, side, side, dtype=torch.uint8)
    valid = torch.ones(samples, objects, dtype=torch.bool)
    batch = {"pixels": pixels, "masks": masks, "valid": valid, "numbers": list(range(samples))}
    return Dry(_stage(MemoryStage, recipe), student, [tracker, teacher], batch)


MAKE = {"image": _image, "text": _text, "memory": _memory}


@dataclass(frozen=True)
class Cost:
    """What forward and backward of one micro-batch take."""

    peak: int  # bytes held at once, data included, without the trained weights' gradients
    flops: int  # frozen parts included; what `recompute` does twice counts once


def cost(dry: Dry) -> Cost:
    """Run a stage's loss forward and backward."""
    for parameter in dry.student.train().parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Ledger() as ledger, fused_attention(ledger):
        loss = dry.stage.loss(dry.student, dry.batch)["loss"]
        ledger.in_backward = True
        loss.backward()
    data = sum(value.nbytes for value in dry.batch.values() if isinstance(value, Tensor))
    return Cost(ledger.peak + data, ledger.flops)
