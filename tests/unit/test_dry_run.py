# SPDX-License-Identifier: Apache-2.0
"""The dry run next to real steps: what it says of memory and operations is what a real step takes."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effsam3.hardware.budget.dry_run import Ledger, cost, dry_stage, fused_attention
from effsam3.hardware.budget.estimates import (
    measure,
)
from effsam3.recipe.reader import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
IMAGE, TEXT, MEMORY = (str(RECIPES / f"smoke/{stage}.yaml") for stage in ("image", "text", "memory"))
LARGE = ["hardware=gpu", "train.global_batch_size=64", "train.micro_batch_size=64"]
SHORT = ["sam3.checkpoint=tiny", "data.frames=3", "train.micro_batch_size=1"]  # clips for the memory


class Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(run, besides=()) -> int:
    """Bytes of the storages that autograd keeps of a forward, those of some tensors left out: the reference."""
    kept = weakref.WeakSet()

    def pack(tensor):
        saved = Saved(tensor.detach())  # with its history it would keep itself
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = run()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in kept}
    del output
    for tensor in besides:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


# ---- the dry run


def test_a_ledger_counts_what_is_held():
    with Ledger() as ledger:
        one = torch.zeros(1000)  # 4000 bytes
        two = one.double()  # 8000
        view = two[:10]  # a view holds nothing of its own
        del two, view
        three = one + 1  # 4000
    assert (ledger.now, ledger.peak) == (8000, 12000)
    del one, three
    assert ledger.now == 0


def test_a_ledger_does_not_count_what_was_there_before():
    weights = torch.zeros(10, 100)
    with Ledger() as ledger:
        turned = weights.t()
        product = torch.zeros(1, 100) @ turned  # 400 bytes and 40
    assert ledger.now == 40 and ledger.peak == 440
    del product


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dry_student_keeps_what_a_real_one_does(precision):
    from effsam3.stages.image.training import make_student

    recipe = load_recipe(IMAGE, [f"train.precision={precision}"])
    dry = dry_stage(recipe, 3)
    autocast = dry.stage.place.autocast
    with autocast(), Ledger() as ledger:
        kept = dry.stage.student.train()(dry.stage.pixels(dry.batch)).last_hidden_state
    held = ledger.now
    real = make_student(recipe, 64, 224, 14).train()
    pixels = torch.zeros(3, 3, 224, 224)

    def forward():
        with autocast():
            return real(pixels).last_hidden_state

    reference = saved_bytes(forward, real.parameters())
    assert kept.shape == (3, 256, 64)
    # A LayerNorm in bf16 is float32 in a dry run.
    assert reference < held < (1.1 if precision == "fp32" else 1.6) * reference


def test_a_dry_run_peaks_where_a_real_step_does():
    """The same loss on tensors with contents, followed by a ledger: weights of a real chassis, a real batch."""
    from effsam3.stages.image.training import make_student

    recipe = load_recipe(IMAGE)
    dry = dry_stage(recipe, 2)
    student = make_student(recipe, 64, 224, 14).train()
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stage = dry.stage
    stage.mean_C, stage.deviation_C = torch.zeros(64), torch.ones(64)
    batch = {
        "pixels": torch.zeros(2, 3, 224, 224, dtype=torch.uint8),
        "features": torch.zeros(2, 64, 16, 16, dtype=torch.float16),
        "sizes": torch.full((2, 2), 224),
    }
    with Ledger() as ledger:
        stage.loss(student, batch)["loss"].backward()
    data = sum(tensor.nbytes for tensor in batch.values())
    assert cost(dry_stage(recipe, 2)).peak == pytest.approx(ledger.peak + data, rel=0.02)


def test_twice_the_batch_takes_twice_the_memory_and_a_teacher_stands_beside():
    four, eight = (measure(load_recipe(IMAGE, [f"train.micro_batch_size={size}"])) for size in (4, 8))
    assert 1.8 < eight.micro_batch / four.micro_batch < 2.1  # a layer's gradients are the same whatever the batch
    online = measure(load_recipe(IMAGE, ["student=tiny_vit_5m", "teacher=online", "loss.neck=0.1"]))
    assert online.frozen > four.frozen + 4 * 100_000 and online.micro_batch > four.micro_batch
    assert measure(load_recipe(IMAGE, ["student_image_size=112"])).micro_batch < 0.5 * four.micro_batch
    text = measure(load_recipe(TEXT))
    assert text.frozen > 4 * 1_000_000 and text.trained > 1_500_000


def test_the_memory_is_measured_and_recomputing_saves():
    kept, recomputed = (measure(load_recipe(MEMORY, [*SHORT, f"train.recompute={r}"])) for r in ("false", "true"))
    assert recomputed.micro_batch < 0.8 * kept.micro_batch
    assert kept.trained == recomputed.trained > 500_000
    assert kept.flops == recomputed.flops > 1e9  # what is done twice counts once
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "effsam3.hardware.budget.dry_run"  # put back


def test_the_memory_keeps_what_real_tensors_would():
    """The tracker's forward on real and on fake tensors, attention alike: autograd keeps what the ledger holds."""
    recipe = load_recipe(MEMORY, [*SHORT, "data.frames=2", "loss.memory=0"])
    dry = dry_stage(recipe, 1)
    with Ledger() as ledger, fused_attention(ledger):
        terms = dry.stage.loss(dry.stage.student.train(), dry.batch)
    held = ledger.now
    del terms
    real = dry_stage(recipe, 1)
    for module in (real.stage.student.tracker, real.stage.student):
        for owner in module.modules():
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, torch.nn.Parameter):
                    filled = torch.nn.Parameter(filled, requires_grad=tensor.requires_grad)
                    owner.register_parameter(name, filled)
                else:
                    setattr(owner, name, filled)
    # The student stands on the tracker's own modules; single parameters are shared one by one.
    for name, parameter in real.stage.student.named_parameters():
        path, _, last = name.rpartition(".")
        real.stage.student.tracker.get_submodule(path).register_parameter(last, parameter)
    batch = real.batch | {"pixels": torch.zeros(real.batch["pixels"].shape, dtype=torch.uint8)}
    tracker = real.stage.student.tracker
    there = (*tracker.parameters(), *tracker.buffers())
    with fused_attention(Ledger()):
        reference = saved_bytes(lambda: real.stage.loss(real.stage.student.train(), batch)["loss"], there)
    assert 0.95 * reference < held < 1.3 * reference  # positions are made once and kept, too


# ---- operations


@pytest.mark.parametrize(("recipe", "options"), [(IMAGE, ["teacher=online"]), (TEXT, [])])
def test_operations_are_those_of_a_real_step(recipe, options):
    """Counted on real tensors; torch's own attention as products of matrices, so that both count the same."""
    recipe = load_recipe(recipe, [*options, "train.precision=fp32"])
    dry = dry_stage(recipe, 2)

    def real(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, FakeTensor) else value

    for module in (dry.stage.student, *dry.stage.frozen):
        for part in module.modules():
            for owned in (part._parameters, part._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        with torch.no_grad():
                            filled = torch.full(tensor.shape, 0.01).to(tensor.dtype)
                        owned[name] = (
                            torch.nn.Parameter(filled, tensor.requires_grad) if owned is part._parameters else filled
                        )
    for name in ("mean_C", "deviation_C"):
        setattr(dry.stage, name, torch.ones(getattr(dry.stage, name).shape))
    batch = {name: real(value) for name, value in dry.batch.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dry.stage.loss(dry.stage.student.train(), batch)["loss"].backward()
    assert measure(recipe).flops == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
