# SPDX-License-Identifier: Apache-2.0
"""`train.compile`: whatever cannot be compiled ends the run, so that nobody trains slowly without knowing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from effsam3.errors import UserError

OFF = "train.compile=false trains without it"


@contextmanager
def compiling_explained(asked: bool) -> Iterator[None]:
    """Turn an error of torch.compile into one that tells what to do; nothing unless it is `asked` for.

    Raises:
        UserError: torch.compile is switched off, or cannot compile student, teacher or loss.
    """
    if not asked:
        yield
        return
    import torch._dynamo.config as settings  # a second, which runs without it do not have to wait
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    for name, variable in (("disable", "TORCHDYNAMO_DISABLE"), ("suppress_errors", "TORCHDYNAMO_SUPPRESS_ERRORS")):
        if getattr(settings, name):
            raise UserError(
                f"train.compile: torch._dynamo.config.{name} is set, with which torch trains uncompiled without a "
                f"word; unset {variable} and TORCH_COMPILE_DISABLE, or {OFF}"
            )
    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        what = next(line for line in str(error).splitlines() if line.strip()).strip()
        raise UserError(
            f"train.compile: torch.compile failed, {type(error).__name__}: {what}. On a CPU it needs a C++ compiler "
            f"(g++), on a GPU triton; {OFF}"
        ) from error
