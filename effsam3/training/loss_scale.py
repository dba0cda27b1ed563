# SPDX-License-Identifier: Apache-2.0
"""The loss scale of fp16: small gradients would be 0 in float16, so the loss is multiplied before the backward pass.

A gradient that overflows halves the scale and its step is skipped; 2,000 steps without one double it. So it is with
accelerate and, here, under DeepSpeed. Checkpoints keep the state in one form for both.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from effsam3.training.optimizer_state import zero_stage

FIRST, GROW_AFTER = 2.0**16, 2000  # torch's own
SMALLEST = 1.0  # below it, an overflow has another reason than the scale
FORM = {"scale": float, "good_steps": int, "skipped": int}


class ZeroScaler:
    """torch's GradScaler for a ZeRO optimizer, which unscales, clips and looks for overflow itself.

    Under torch_autocast DeepSpeed 0.19 uses torch's own and gets it wrong: gradients are clipped before they are
    unscaled, each rank looks for overflow in its own part only, and the scale stays after one.
    """

    def __init__(self, zero: Any):
        self.zero = zero
        zero.torch_autocast_gradscaler = None
        self.load_state_dict({"scale": FIRST, "_growth_tracker": 0})

    def get_scale(self) -> float:
        return self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "_growth_tracker": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["_growth_tracker"]
        self.zero.override_loss_scale(self.scale)

    def update(self) -> None:
        """Look at the step just taken; all ranks have seen the same norm, so all of them decide the same."""
        scale, good_steps = (self.scale / 2, 0) if self.zero.overflow else (self.scale, self.good_steps + 1)
        if good_steps == GROW_AFTER:
            scale, good_steps = 2 * scale, 0
        self.load_state_dict({"scale": scale, "_growth_tracker": good_steps})


class LossScale:
    """What the loss is multiplied by, and how often a step was skipped; 1 and never in bf16 and fp32."""

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: Any, precision: str):
        """`student` and `optimizer` are what `accelerator.prepare` has returned."""
        self.scaler: Any = accelerator.scaler
        if precision == "fp16" and accelerator.state.deepspeed_plugin is not None:
            divides = zero_stage(accelerator) > 0
            self.scaler = ZeroScaler(optimizer.optimizer) if divides else student.torch_autocast_z0_gradscaler
        self.skipped = 0  # steps of this run
        self.before = self.now

    @property
    def now(self) -> float:
        """The factor of the next loss."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def skipped_step(self) -> bool:
        """Return whether the step just taken was skipped because its gradient overflowed, as happens now and then.

        With a scale below `SMALLEST` it is no longer excused: the gradient itself is not finite.
        """
        if isinstance(self.scaler, ZeroScaler):
            self.scaler.update()
        overflowed = self.now < self.before
        self.before = self.now
        self.skipped += overflowed
        return overflowed and self.now >= SMALLEST

    def metrics(self) -> dict[str, float]:
        """Return what is logged; nothing where nothing is scaled."""
        return {} if self.scaler is None else {"train/loss_scale": self.now}

    def state(self) -> dict[str, Any]:
        """Return what `trainer.json` keeps, the same on any hardware; nothing where nothing is scaled."""
        if self.scaler is None:
            return {}
        good_steps = self.scaler.state_dict()["_growth_tracker"]
        return {"loss_scale": {"scale": self.now, "good_steps": good_steps, "skipped": self.skipped}}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume with what a checkpoint's trainer.json has kept, if it has."""
        if kept := state.get("loss_scale"):
            own = {"scale": kept["scale"], "_growth_tracker": kept["good_steps"]}
            self.scaler.load_state_dict(self.scaler.state_dict() | own)
            self.before, self.skipped = self.now, kept["skipped"]
