# SPDX-License-Identifier: Apache-2.0
"""Memory before it hurts: dry runs against real ones, hardware by hand, verdicts, advice, an out-of-memory message."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effsam3 import train
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.hardware.accelerate_configs import REDUCE_BUCKET
from effsam3.hardware.budget.dry_run import Ledger, cost, dry_stage, fused_attention
from effsam3.hardware.budget.estimates import (
    GIB,
    Hardware,
    Sizes,
    advice,
    attempt,
    estimate,
    explain_out_of_memory,
    fits,
    header_lines,
    largest_micro_batch,
    measure,
    micro_batches,
    other_changes,
    out_of_memory_explained,
    read_hardware,
    resized,
    running_hardware,
    states,
    table,
)
from effsam3.recipe.reader import flat, load_recipe
from effsam3.train import announce
from effsam3.training.report import Report

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


# ---- hardware, by hand


@pytest.mark.parametrize(
    ("processes", "stage", "offloads", "expected", "host"),
    [
        (1, None, (False, False), {"weights": 4000, "gradients": 4000, "optimizer": 8000}, 0),
        (4, None, (False, False), {"weights": 4000, "gradients": 8000, "optimizer": 8000}, 0),
        (4, 1, (False, False), {"weights": 4000, "gradients": 4000, "optimizer": 3000}, 0),
        (4, 2, (False, False), {"weights": 4000, "gradients": 1000, "optimizer": 3000}, 0),
        (4, 3, (False, False), {"weights": 5000, "gradients": 1000, "optimizer": 3000}, 0),
        (4, 2, (True, False), {"weights": 4000, "gradients": 0}, 4000),
        (4, 3, (True, True), {"weights": 4000, "gradients": 0}, 5000),
    ],
)
def test_what_hardware_keeps_of_a_thousand_parameters(processes, stage, offloads, expected, host):
    buckets = 0 if stage is None else 4 * REDUCE_BUCKET
    device, moved = states(Hardware("x", processes, stage, *offloads), 1000)
    assert device.pop("ZeRO's buckets", 0) == buckets
    assert (device, moved) == (expected, host)


def test_hardware_is_read_from_their_files():
    assert read_hardware("zero3") == Hardware("zero3", 8, 3, False, False)
    assert read_hardware("ddp_cpu").zero_stage is None and not read_hardware("ddp_cpu").has_gpu
    assert read_hardware("gpu").has_gpu and read_hardware("gpu").processes == 1


def test_an_estimate_adds_up():
    recipe = load_recipe(IMAGE, ["hardware=gpu", "train.ema=0.9", "train.keep_checkpoints=2"])
    found = estimate(recipe, Sizes(trained=1000, frozen=50, micro_batch=700, flops=0))
    assert found.total == 16_000 + 4000 + 50 + 700 + GIB
    assert found.checkpoint == 16_000  # weights, two moments, averaged weights
    assert found.checkpoints == 2 * 16_000 + 4000


# ---- output


def test_micro_batches_divide_the_global_batch():
    recipe = load_recipe(IMAGE, ["train.global_batch_size=512"])
    assert micro_batches(recipe, 8) == [1, 2, 4, 8, 16, 32, 64]
    assert micro_batches(load_recipe(IMAGE, ["train.global_batch_size=48"]), 8) == [1, 2, 3, 6]


def test_the_largest_micro_batch_that_fits_is_advised():
    recipe = load_recipe(IMAGE, LARGE)
    sizes = measure(recipe)
    quarter = estimate(*resized(recipe, sizes, 16)).total
    device = int(quarter / 0.9) + 1
    assert fits(quarter, device) and not fits(quarter + 2, device)
    assert largest_micro_batch(recipe, sizes, device) == ("train.micro_batch_size=16", quarter)
    assert advice(recipe, sizes, device) == [f"train.micro_batch_size=16 would take {quarter / GIB:.1f} GiB"]
    assert largest_micro_batch(recipe, sizes, GIB) is None
    assert [line.endswith("too much by itself") for line in advice(recipe, sizes, GIB)] == [True]


def test_where_no_micro_batch_helps_the_hardware_is_named_next():
    """A student of a billion parameters: what counts is what is kept of it."""
    recipe = load_recipe(
        IMAGE, ["hardware=zero2", "train.global_batch_size=64", "train.ema=0.9", "train.precision=bf16"]
    )
    sizes = replace(measure(recipe), trained=1_000_000_000)
    totals = {change: total / GIB for change, total in other_changes(recipe, sizes)}
    assert list(totals)[0] == "hardware=zero3" and list(totals)[-1] == "train.ema=0"
    now = estimate(recipe, sizes).total / GIB
    assert now - totals["train.ema=0"] == pytest.approx(4e9 / GIB)
    assert now - totals["hardware=zero3"] == pytest.approx(-0.5e9 / GIB)  # whole while a step runs, and its part


def test_a_table_says_whether_a_device_is_enough():
    recipe = load_recipe(IMAGE, LARGE)
    enough, short = table(recipe, 80), table(recipe, 1.5)
    assert "verdict   fits 80.0 GiB" in enough and "would take" not in enough
    assert "verdict   does not fit 1.5 GiB" in short and "train.micro_batch_size=" in short
    parts = [line.split()[:2] for line in enough.splitlines()[1:] if line.startswith(" ")]
    total = sum(float(size) * {"GiB": 1, "MiB": 1 / 1024}[unit] for size, unit in parts)
    assert float(enough.split("about ")[1].split()[0]) == pytest.approx(total, abs=0.15)
    assert "24 GiB (RTX 4090, A10) are enough" in table(recipe)


def test_show_prints_it_last_and_keeps_it_a_comment(tmp_path, capsys):
    assert main(["show", IMAGE, "hardware=gpu", "--device-gib", "24"]) == 0
    text = capsys.readouterr().out
    assert text.index("# verdict   fits 24.0 GiB") > text.index("# store")
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(IMAGE, ["hardware=gpu"])


def test_show_estimates_only_what_it_is_asked_for(capsys):
    assert main(["show", IMAGE]) == 0
    quick = capsys.readouterr().out
    assert main(["show", IMAGE, "--budget"]) == 0
    asked = capsys.readouterr().out
    assert asked.startswith(quick) and asked[len(quick) :].startswith("# device    about ") and "verdict" not in quick
    assert main(["show", str(RECIPES / "smoke/release.yaml"), "--budget"]) == 0
    assert "# device    nothing is trained here" in capsys.readouterr().out


def test_show_refuses_a_device_without_memory_and_says_what_is_unknown(capsys):
    assert main(["show", IMAGE, "--device-gib", "0"]) == 2
    assert "--device-gib: 0 is not above 0" in capsys.readouterr().err
    assert main(["show", IMAGE, "--budget", "sam3.checkpoint=someone/sam3"]) == 0
    assert "# device    unknown yet: sam3.checkpoint: the sizes of 'someone/sam3'" in capsys.readouterr().out


def test_the_header_has_one_line():
    recipe, hardware = load_recipe(IMAGE), read_hardware("cpu")
    line = header_lines(recipe, hardware, Sizes(trained=1000, frozen=0, micro_batch=3 * GIB, flops=0))["budget"]
    assert line.startswith("about 3.0 GiB") and "(micro-batch 3.0 GiB, " in line
    assert "\n" not in line


def test_a_run_on_a_gpu_is_announced_without_another_dry_run(tmp_path, monkeypatch, capsys):
    """Memory for the header and operations for the speed are of one dry run, that of `measure`."""
    recipe = load_recipe(IMAGE, ["hardware=gpu"])
    sizes = measure(recipe)
    assert sizes.micro_batch > 1e6 and sizes.flops > 1e9
    monkeypatch.setattr("effsam3.hardware.budget.estimates.dry_stage", None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L4")
    accelerator = SimpleNamespace(
        device=torch.device("cuda"),
        is_main_process=True,
        num_processes=1,
        state=SimpleNamespace(deepspeed_plugin=None),
    )
    stage = SimpleNamespace(describe=lambda: {"student": "tiny"}, train_size=100, facts={})
    loggers = SimpleNamespace(start=lambda *started: "")
    state = {"step": 0, "ended": True}
    announce(recipe, stage, accelerator, Report(tmp_path, True), loggers, 10, 2, state, sizes)
    assert "\nbudget   about 1.1 GiB" in capsys.readouterr().out
    source = inspect.getsource(train)
    assert "dry_run" not in source and source.count("attempt(") == source.count("attempt(measure, recipe") == 1


def test_a_run_is_on_the_hardware_that_it_was_started_on():
    def started(processes, plugin=None):
        return SimpleNamespace(num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin))

    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": zero})
    assert running_hardware(started(4), "zero2") == Hardware("zero2", 4, None, False, False)
    assert running_hardware(started(16, plugin), "ddp") == Hardware("ddp", 16, 3, True, False)


@pytest.mark.parametrize("path", [IMAGE, TEXT, MEMORY])
def test_an_estimate_that_cannot_be_made_stops_nothing(path):
    recipe = load_recipe(path, ["sam3.checkpoint=someone/sam3"])
    with pytest.raises(UserError, match="sizes of 'someone/sam3' are not known"):
        measure(recipe)
    assert attempt(measure, recipe, None) is None
    with pytest.raises(UserError, match="out of memory.*; lower train.micro_batch_size"):
        with out_of_memory_explained(recipe):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_clip_with_fewer_frames_or_objects_takes_less():
    recipe = load_recipe(MEMORY, ["sam3.checkpoint=tiny", "data.objects=2", "data.frames=5", "train.trunk_batch=1"])
    sizes = Sizes(trained=1000, frozen=0, micro_batch=1000 * GIB, flops=0)
    found = dict(islice((pair for pair in other_changes(recipe, sizes) if pair[0].startswith("data")), 2))
    base = estimate(recipe, replace(sizes, micro_batch=0)).total
    assert found == {"data.objects=1": base + 500 * GIB, "data.frames=2": base + 400 * GIB}


@pytest.mark.parametrize(("path", "keys"), [(IMAGE, []), (TEXT, []), (MEMORY, SHORT)])
def test_the_knobs_are_keys_of_the_recipe(path, keys):
    recipe = load_recipe(path, keys)
    assert set(recipe.knobs) <= set(flat(recipe))


def test_out_of_memory_names_the_knobs_and_what_would_help():
    recipe = load_recipe(IMAGE, ["hardware=gpu"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about fragmentation")
    told = explain_out_of_memory(recipe, error)
    assert isinstance(told, UserError)
    lines = str(told).splitlines()
    assert lines[0] == "the device is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert "train.micro_batch_size=4, hardware=gpu, train.ema=0.0" in lines[2]
    assert lines[3].startswith("change: train.micro_batch_size=2 would take 1.")
    small = str(explain_out_of_memory(load_recipe(IMAGE, LARGE), error, device_gib=1.5))
    assert "change: train.micro_batch_size=16 would take" in small


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
