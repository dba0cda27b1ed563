# SPDX-License-Identifier: Apache-2.0
"""What each part of a model costs on one image: parameters, FLOPs, peak memory, and its time in several runtimes."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effsam3.benchmarks.speed import in_turn
from effsam3.models.exporting.flow import TRACED, Example, flow, run_part
from effsam3.models.exporting.onnx_files import OnnxPart, write_onnx
from effsam3.models.exporting.parts import Part

RUNTIMES = ("eager", "compiled", "onnxruntime", "openvino", "openvino_default")
BY_BOX = ("trunk", "tracker_neck", "mask_decoder")  # what an image and a box take
BY_TEXT = ("trunk", "detector_neck", "text_encoder", "detector")


class Counter(TorchDispatchMode):
    """Adds up operations: two for every multiplication and its addition, in matrix products and convolutions.

    torch's own counter passes over the CPU's attention, and stops at a branch that depends on the contents of a meta
    tensor. Here the answer is True: a mask then masks nothing.
    """

    attention = torch.ops.aten._scaled_dot_product_flash_attention
    formulas = flop_registry | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[attention]}

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return True
        result = function(*arguments, **(options or {}))
        if (formula := self.formulas.get(function.overloadpacket)) is not None:
            self.flops += formula(*arguments, **(options or {}), out_val=result)
        return result


class Watch(TorchDispatchMode):
    """Looks at every operation: which parameters it reads, and how many bytes of results are alive at once.

    What an operation uses inside, such as a convolution's workspace, is not seen.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.sizes = {id(value): value.numel() for value in module.parameters()}
        # A buffer or a parameter is there before anything runs.
        self.seen = {value.untyped_storage().data_ptr() for value in [*module.parameters(), *module.buffers()]}
        self.read: set[int] = set()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read |= self.sizes.keys() & {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.seen:
                self._born(leaf.untyped_storage())
        return found

    def _born(self, storage: Any) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.alive -= size

    @property
    def parameters(self) -> int:
        """How many parameters were read."""
        return sum(self.sizes[one] for one in self.read)


def costs(example: Example) -> dict[str, float]:
    """Return `parameters`, `gflop` and `peak_mb` (of results, without weights) of a part on an example, in PyTorch."""
    watch = Watch(example.part.module)
    with Counter() as counter, watch:
        run_part(example.part, list(example.inputs.values()))
    return {
        "parameters": watch.parameters,
        "gflop": counter.flops / 1e9,
        "peak_mb": watch.peak / 1e6,
    }


def profile_parts(
    models: Mapping[str, Sequence[Part]], runtimes: Iterable[str], folder: Path, rounds: int, threads: int
) -> dict[str, dict[str, dict]]:
    """Measure the parts of one or more models on one image, one prompt, one remembered frame.

    All models and runtimes take their turns in one process, part by part, so that a busy machine slows all alike.

    Args:
        models: the parts of each model by its name.
        folder: an empty one, for files.
        rounds: timed calls of each.
        threads: of every runtime.

    Returns:
        {model: {part: `parameters`, `gflop`, `peak_mb`, `ms`: {runtime: {`median`, `p90`}}}}.
    """
    lengths = dict.fromkeys(TRACED, 1)
    examples = {
        model: {example.part.name: example for example in flow(parts, lengths)} for model, parts in models.items()
    }
    found: dict[str, dict[str, dict]] = {model: {} for model in models}
    names = dict.fromkeys(name for parts in examples.values() for name in parts)
    for name in names:
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for model, of_model in examples.items():
            example = of_model[name]
            found[model][name] = costs(example)
            for runtime, call in calls_of(example, runtimes, folder / model, threads).items():
                calls[model, runtime] = call
        taken = in_turn({"/".join(key): call for key, call in calls.items()}, torch.device("cpu"), rounds, warm_up=1)
        for model, runtime in calls:
            ms = taken[f"{model}/{runtime}"]
            own = found[model][name].setdefault("ms", {})
            own[runtime] = {"median": statistics.median(ms), "p90": quantile(ms, 0.9)}
    return found


def calls_of(example: Example, runtimes: Iterable[str], folder: Path, threads: int) -> dict[str, Callable[[], object]]:
    """Return a call of a part in each runtime."""
    folder.mkdir(parents=True, exist_ok=True)
    part, inputs = example.part, list(example.inputs.values())
    path = folder / f"{part.name}.onnx"
    if any(runtime not in ("eager", "compiled") for runtime in runtimes):
        # For these lengths only: what is timed needs no others, and an exporter would take them for constants anyway.
        write_onnx(example, path, dynamic=False)
    calls: dict[str, Callable[[], object]] = {}
    for runtime in runtimes:
        if runtime == "eager":
            calls[runtime] = partial(run_part, part, inputs)
        elif runtime == "compiled":
            calls[runtime] = partial(run_part, Part(part.name, torch.compile(part.module), {}, {}), inputs)  # type: ignore[arg-type]  # torch.compile returns a callable of its module
        elif runtime == "onnxruntime":
            calls[runtime] = partial(OnnxPart(path, threads), example.inputs)
        else:
            from effsam3.models.exporting.openvino_files import OpenVinoPart

            calls[runtime] = partial(OpenVinoPart(path, runtime == "openvino", threads), example.inputs)
    return calls


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
