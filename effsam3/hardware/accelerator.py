# SPDX-License-Identifier: Apache-2.0
"""One accelerator for all hardware: a CPU, one GPU, DDP, DeepSpeed. The recipe's numbers go in before
anything is built."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from effsam3.errors import RecipeError, UserError
from effsam3.hardware.accelerate_configs import REDUCE_BUCKET, no_devices, read_config, twin_on_cpu
from effsam3.training.optimizer_state import zero_stage

PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}  # as accelerate calls it
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in
Result = TypeVar("Result")


def launched_processes() -> int:
    """Return the number of processes that the launcher has started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Return how many of these are on this machine, as torchrun and `accelerate launch` tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def refuse_missing_gpu(hardware: str) -> None:
    """Refuse to work on the CPU, a hundred times slower, where GPUs were asked for.

    The config that `accelerate launch` was given counts, else the recipe's.

    Raises:
        RecipeError: the hardware has GPUs, and there is none.
    """
    hidden = _launched() and no_devices(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if torch.cuda.is_available() or hidden or _asked_for_cpu(hardware):
        return
    if _launched():
        asked, other = "`accelerate launch` was told to use GPUs", "--config_file accelerate_configs/cpu.yaml"
    else:
        asked, other = f"hardware: {hardware} is for GPUs", f"hardware={twin_on_cpu(hardware)}"
    raise RecipeError(
        f"{asked}, but torch {torch.__version__} finds none here; see that nvidia-smi lists one, that this job or "
        f"container was given it, and that torch is built for it. To work on the CPU all the same: {other}"
    )


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ  # set by every `accelerate launch`


def _asked_for_cpu(hardware: str) -> bool:
    told = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return told or (not _launched() and read_config(hardware).on_cpu)


def device_for(hardware: str) -> torch.device:
    """Return where work in this process is done: on a GPU, unless there is none or the CPU was asked for.

    The config that `accelerate launch` was given counts, else the recipe's.
    """
    return torch.device("cuda" if torch.cuda.is_available() and not _asked_for_cpu(hardware) else "cpu")


def make_accelerator(
    hardware: str,
    precision: str,
    accumulation: int = 1,
    micro_batch: int = 1,
    clip_grad_norm: float = 0.0,
    loggers: tuple[str, ...] = (),
    folder: str | None = None,
    timeout_s: int = 1800,
) -> Accelerator:
    """Build the accelerator for what `accelerate launch` has put into the environment, else for the recipe's hardware.

    `clip_grad_norm`, `accumulation` and `micro_batch` reach DeepSpeed's own configuration: under DeepSpeed
    `clip_grad_norm_` only reads the norm, and an accumulation of its own would be another learning.

    Raises:
        UserError: accelerate does not see as many processes as were launched.
    """
    on_gpu = device_for(hardware).type == "cuda"
    by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported on saving, warns that there is none
    torch.backends.cudnn.allow_tf32 = False  # else convolutions in fp32 only keep 10 bits of the mantissa on GPUs
    handlers = []
    if "LOCAL_RANK" in os.environ:
        # Without a backend, accelerate under DeepSpeed on a CPU lets every rank believe that it is the only one.
        backend = {} if on_gpu else {"backend": "gloo"}
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s), **backend))
    if by_deepspeed and not on_gpu:
        import deepspeed.ops

        # Else DeepSpeed compiles a C++ communication kernel first, minutes of silence.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = Accelerator(
        cpu=not on_gpu and not by_deepspeed,
        # DeepSpeed has its own precision settings, and accelerate refuses to have both.
        mixed_precision=None if by_deepspeed else PRECISION[precision],
        gradient_accumulation_steps=accumulation,
        log_with=list(loggers) or None,
        project_config=ProjectConfiguration(folder, logging_dir=folder and f"{folder}/tensorboard"),
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != launched_processes():
        raise UserError(
            f"{launched_processes()} processes were launched but accelerate sees {accelerator.num_processes}; start "
            "with `effsam3 launch` or `accelerate launch --config_file accelerate_configs/...`"
        )
    if by_deepspeed:
        _configure_deepspeed(accelerator, precision, clip_grad_norm)
    elif precision == "fp16" and not on_gpu:
        # On a CPU accelerate would train in float32 without a word. Torch has all that fp16 takes there as well.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    set_batch(accelerator, micro_batch, accumulation)
    return accelerator


def set_batch(accelerator: Accelerator, micro_batch: int, accumulation: int) -> None:
    """Set how many micro-batches each rank accumulates, and their size; before `prepare`, which reads it."""
    accelerator.gradient_accumulation_steps = accumulation
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
        plugin.deepspeed_config["gradient_accumulation_steps"] = accumulation
        plugin.deepspeed_config["train_batch_size"] = micro_batch * accumulation * accelerator.num_processes


def _configure_deepspeed(accelerator: Accelerator, precision: str, clip_grad_norm: float) -> None:
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = clip_grad_norm
    config["zero_optimization"]["reduce_bucket_size"] = REDUCE_BUCKET
    # DeepSpeed's own bf16 mode casts the weights and breaks BatchNorm; autocast over float32 weights does not.
    # No module is safe in its sense: those it would average in half precision, where DDP averages in float32.
    dtype = str(HALF.get(precision, torch.bfloat16)).removeprefix("torch.")
    config["torch_autocast"] = {"enabled": precision in HALF, "dtype": dtype, "lower_precision_safe_modules": []}
    # Else accelerate replaces an offloaded AdamW by DeepSpeed's own, which first compiles C++ on every machine, for
    # minutes. Torch's takes 40 ms per step for 10 M parameters on one core, and all hardware has the same one.
    config["zero_force_ds_cpu_optimizer"] = False
    # accelerate has told transformers of it, which under ZeRO-3 would divide every frozen model that it builds.
    unset_hf_deepspeed_config()


def frozen_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a frozen teacher, the same on all hardware.

    accelerate's own does nothing under DeepSpeed, whose engine only autocasts the student.
    """
    return torch.autocast(device.type, HALF.get(precision, torch.bfloat16), enabled=precision in HALF)


def on_main(accelerator: Accelerator, call: Callable[[], Result]) -> Result:
    """Let rank 0 make or check something while the others wait; all get what it returns.

    Collective. What rank 0 refuses ends all of them: else the others would wait for it in their next collective.

    Raises:
        UserError: on rank 0, what `call` raises.
        SystemExit: code 2, on the other ranks, which have nothing to add.
    """
    result, refusal = None, None
    if accelerator.is_main_process:
        try:
            result = call()
        except UserError as error:
            refusal = error
    # The answer goes to all in one collective, a refusal, too: no rank is left waiting.
    refused, result = broadcast_object_list([refusal is not None, result])
    if refusal is not None:
        raise refusal
    if refused:
        sys.exit(2)
    return result


def describe_hardware(accelerator: Accelerator) -> str:
    """Describe in a few words what the run is on, such as `1 x cpu`, `2 x cpu, DDP`, `8 x NVIDIA H200, ZeRO-2`."""
    device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    divided = f"ZeRO-{stage}" if (stage := zero_stage(accelerator)) else "DDP"
    return f"{accelerator.num_processes} x {device}{f', {divided}' if accelerator.num_processes > 1 or stage else ''}"
