# SPDX-License-Identifier: Apache-2.0
"""A stage's loss without weights, data or a device: what a micro-batch allocates and computes.

Fake tensors have shapes and no contents. The stage's own loss runs forward and backward on them while a ledger follows
every allocation and product, so the count includes frozen parts and recomputation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effsam3 import stages
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.recipe.common import StageRecipe
from effsam3.stages.protocol import Batch, Stage

# ---- what allocates, without allocating


class Ledger(TorchDispatchMode):
    """Follows what is allocated, `now` and at most (`peak`), in bytes, and the floating-point operations.

    `flops` are those of matrix products and convolutions only, as is usual. Real tensors stay real, fake ones fake.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.in_backward = False
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if isinstance(arguments[0] if arguments else None, FakeTensor):
            if function is torch.ops.aten._local_scalar_dense.default:
                return True  # a branch that depends on contents: assume true, the more expensive path
            if function is torch.ops.aten.index.Tensor:  # masks are real, so indices are known although values are not
                arguments = (arguments[0], [_numbers(index) for index in arguments[1]])
        for tensor in tree_leaves((arguments, options)):
            if isinstance(tensor, Tensor):  # what was there before allocates nothing when it is looked at
                self.storages.add(tensor.untyped_storage())
        result = function(*arguments, **(options or {}))
        if (formula := flop_registry.get(function.overloadpacket)) is not None:
            self.add_flops(formula(*arguments, **(options or {}), out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                # Freed with the storage, not with a name: autograd keeps what backward will read.
                weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.now -= size

    def add_flops(self, count: int) -> None:
        """Count operations, but not those of a forward that is done again: backward itself runs without autograd."""
        if not (self.in_backward and torch.is_grad_enabled()):
            self.flops += count


def _numbers(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return index
    return index.nonzero()[:, 0]


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


# ---- a stage without weights and data


class DryPlace:
    """One rank on a CPU, in a recipe's precision."""

    process_index, num_processes = 0, 1
    device = torch.device("cpu")

    def __init__(self, precision: str):
        self.precision = precision

    def autocast(self) -> torch.autocast:
        """Return the context of the student's forward."""
        return frozen_autocast(self.device, self.precision)


@dataclass(frozen=True)
class Dry:
    """A stage and a micro-batch whose floating-point tensors have no contents."""

    stage: Stage
    batch: Batch


def dry_stage(recipe: StageRecipe, samples: int) -> Dry:
    """Build the stage of a recipe and a micro-batch of `samples`, without weights and data.

    Raises:
        UserError: the sizes of the recipe's SAM 3 are not known.
    """
    with torch.device("meta"):
        stage = stages.training(recipe.stage).STAGE.from_shapes(recipe, DryPlace(recipe.train.precision))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[Tensor, Tensor] = {}  # modules share some of them

    def fake_of(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            with fake:
                empty = torch.empty_like(tensor, device="cpu")
                fakes[tensor] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
        return fakes[tensor]

    for module in {part for whole in (stage.student, *stage.frozen) for part in whole.modules()}:
        if isinstance(module, nn.LayerNorm):  # CUDA's autocast computes it in float32, the CPU's does not
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            setattr(module, name, fake_of(tensor))
    batch = stage.example(samples)
    return Dry(stage, {name: fake_of(value) if is_meta(value) else value for name, value in batch.items()})


def is_meta(value: Any) -> bool:
    """Return whether something of a batch is a tensor without contents."""
    return isinstance(value, Tensor) and value.is_meta


@dataclass(frozen=True)
class Cost:
    """What forward and backward of one micro-batch take."""

    peak: int  # bytes held at once, data included, without the trained weights' gradients
    flops: int  # frozen parts included; what `recompute` does twice counts once


def cost(dry: Dry) -> Cost:
    """Run a stage's loss forward and backward."""
    # Before the ledger opens: gradients are counted with the hardware, which may divide them among ranks.
    for parameter in dry.stage.student.train().parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Ledger() as ledger, fused_attention(ledger):
        loss = dry.stage.loss(dry.stage.student, dry.batch)["loss"]
        ledger.in_backward = True
        loss.backward()
    data = sum(value.nbytes for value in dry.batch.values() if isinstance(value, Tensor))
    return Cost(ledger.peak + data, ledger.flops)
