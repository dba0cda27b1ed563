# SPDX-License-Identifier: Apache-2.0
"""AdamW's state in a form that any hardware can write and read: each parameter's moments, whole, by its name.

DeepSpeed divides the state among ranks in its own way at each zero stage, so its own checkpoints only fit the hardware
that wrote them. A state saved here under ZeRO-3 on 8 GPUs resumes under DDP on 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(accelerator: Accelerator, student: nn.Module, optimizer) -> dict[str, Tensor]:
    """Return `{"<moment>/<parameter>": tensor}` in float32 on rank 0's CPU, nothing on the others.

    Collective: all ranks call it, with what `accelerator.prepare` has returned. No device holds more than one whole
    parameter at a time. A parameter that has had no gradient yet may be absent.
    """
    if stage := zero_stage(accelerator):
        from deepspeed.utils import safe_get_full_optimizer_state as read

        if stage < 3:
            _link(optimizer.optimizer)
    else:

        def read(parameter: nn.Parameter, moment: str) -> Tensor | None:
            return optimizer.state.get(parameter, {}).get(moment)

    gathered = {}
    for name, parameter in trained(accelerator.unwrap_model(student)):
        for moment in MOMENTS:
            value = read(parameter, moment)
            # Every rank reads, because reading is collective under ZeRO; only one keeps the result, or all would fill
            # their RAM.
            if accelerator.is_main_process and value is not None:
                # One parameter at a time goes to the CPU: the whole state would not fit next to the training on a full
                # device.
                gathered[f"{moment}/{name}"] = value.detach().cpu()
    return gathered


def scatter(accelerator: Accelerator, student: nn.Module, optimizer, tensors: Mapping[str, Tensor], step: int) -> None:
    """Give every rank its part of what `gather` has returned, after `step` steps; all ranks call it."""
    stage, inner = zero_stage(accelerator), optimizer.optimizer
    parameters = trained(accelerator.unwrap_model(student))
    if not stage:
        for _, parameter in parameters:
            # The step counts in AdamW's bias correction; from 0, the first steps after resuming would be far too
            # large.
            inner.state[parameter] = _fresh(parameter, step, inner)
    elif stage < 3:
        # ZeRO creates its state in the first step, so a resumed run must create it here, to have something to write
        # into.
        for flat in inner.single_partition_of_fp32_groups:
            inner.optimizer.state[flat] = _fresh(flat, step, inner.optimizer)
        _link(inner)
    else:
        for flat in inner.fp32_partitioned_groups_flat:
            inner.optimizer.state[flat] = _fresh(flat, step, inner.optimizer)
    for name, parameter in parameters:
        for moment in MOMENTS:
            # A parameter without a gradient so far has no moments; it keeps its zeros.
            if (value := tensors.get(f"{moment}/{name}")) is not None:
                _write(accelerator, stage, inner, parameter, moment, value)


def refuse_other_moments(student: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse moments that are not of this student's parameters; `where` is what messages call their file.

    Raises:
        UserError: one has another name or shape, or a mean of squares is below zero.
    """
    # Checked by name and shape before any rank writes, because a partial state would train on without an error.
    shapes = {f"{moment}/{name}": parameter.shape for name, parameter in trained(student) for moment in MOMENTS}
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name) or (name.startswith("exp_avg_sq/") and (tensor < 0).any()):
            raise UserError(
                f"{where}: {name} is not the state of this student's optimizer; delete this checkpoint to resume from "
                "the one before, or name another with --resume"
            )


@contextmanager
def whole(accelerator: Accelerator, student: nn.Module) -> Iterator[nn.Module]:
    """Give the unwrapped student with whole weights on every rank, even where ZeRO-3 divides them; collective."""
    model = accelerator.unwrap_model(student)
    if zero_stage(accelerator) < 3:
        yield model
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        yield model


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def trained(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that learn, in the model's order, which is the same on every rank."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]


def _link(zero) -> None:
    """Tell each parameter where its part of the state is, under ZeRO-1 and 2.

    DeepSpeed does so itself at the first step, but after the first group of parameters: the others have none then.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _fresh(parameter: Tensor, step: int, optimizer) -> dict:
    """State after `step` steps with moments of zero; torch's AdamW counts in a tensor, DeepSpeed's in a number."""
    # Next to the parameter, where the fused kernel reads it.
    counts = isinstance(optimizer, torch.optim.AdamW)
    count = torch.tensor(float(step), device=parameter.device) if counts else step
    return {"step": count, **{moment: torch.zeros_like(parameter.data) for moment in MOMENTS}}


def _write(accelerator: Accelerator, stage: int, inner, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    if not stage:
        inner.state[parameter][moment].copy_(value)
    elif stage < 3:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
    else:
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        # Not its own division of a whole tensor, which fails where ranks do not divide the count: parts are padded.
        size = safe_get_local_optimizer_state(parameter, moment).numel()
        padded = F.pad(value.flatten(), (0, size * accelerator.num_processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(size)[accelerator.process_index], moment)
