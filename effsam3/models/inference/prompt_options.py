# SPDX-License-Identifier: Apache-2.0
"""What the command line of `predict` asks for: checked before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effsam3.errors import UserError

# By which a file is taken for something to look at, not for a model.
MEDIA = frozenset(
    ".jpg .jpeg .png .webp .bmp .tif .tiff .gif .mp4 .mov .mkv .webm .avi .m4v .mpg .mpeg .ts .mts .wmv .flv".split()
)
MODEL_FILES = (".pt", ".pth", ".safetensors")
IN_MODELS = ("config.json", "merged/config.json", "recipe.yaml", "student.safetensors")


class PredictError(UserError):
    """A prompt that fits neither the model nor the input, or an input that cannot be read."""


@dataclass(frozen=True)
class Asked:
    """Prompts, checked against one another but not yet against the input.

    Raises:
        PredictError: no prompt, an empty one, or prompts that do not go together.
    """

    texts: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]  # x1, y1, x2, y2 and 1, or 0 for an example of what is not meant
    points: tuple[tuple[float, ...], ...]  # x, y and 1 on the object, or 0 next to it
    mask: Path | None
    threshold: float | None
    coarse_masks: bool = False  # of the texts: compute every second row and column only

    def __post_init__(self):
        object.__setattr__(self, "texts", tuple(text.strip() for text in self.texts))
        if not (self.texts or self.boxes or self.points or self.mask):
            raise PredictError("nothing to look for; give --text, --box, --point or, for a video, --mask")
        if "" in self.texts:
            raise PredictError('--text is empty; name what to look for, such as --text "a dog"')
        if self.texts and (self.points or self.mask):
            raise PredictError("--text finds all instances, --point and --mask show one object; give one or the other")
        if len(self.texts) > 1 and self.boxes:
            raise PredictError("boxes are examples of the one text that they come with; give a single --text")
        if not self.texts and any(box[4] == 0 for box in self.boxes):
            raise PredictError(
                "a box with label 0 is an example of what to exclude from --text; without --text it has no meaning"
            )
        if self.points and len(self.boxes) > 1:
            raise PredictError(
                "points show one object, for which there can be one --box; without points, each box shows one object"
            )
        if self.points and all(label == 0 for _, _, label in self.points) and not self.boxes:
            raise PredictError(
                "every point has label 0, off the object; give a point on it (label 1) or a box around it"
            )
        if self.mask is not None and (self.boxes or self.points):
            raise PredictError("--mask already shows the objects; give it on its own")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise PredictError(f"--threshold {self.threshold}: a score is from 0 to 1")
        if self.threshold is not None and not self.texts:
            raise PredictError("--threshold is for the instances that --text finds; what is shown is always segmented")
        if self.coarse_masks and not self.texts:
            raise PredictError("--coarse-masks is for the instances that --text finds; leave it out")

    def as_json(self) -> dict:
        """Return the request as predictions.json records it."""
        given = {name: value for name, value in vars(self).items() if value not in (None, ())}
        found: dict[str, Any] = {name: value for name, value in given.items() if value is not False}
        return found | ({} if self.mask is None else {"mask": str(self.mask)})


def parse(
    texts: Sequence[str],
    boxes: Sequence[str],
    points: Sequence[str],
    mask: str | None,
    threshold: float | None,
    coarse_masks: bool = False,
) -> Asked:
    """Read the prompts of the command line.

    Raises:
        PredictError: as `Asked`; or numbers that are no box or point.
    """
    return Asked(
        tuple(texts),
        tuple(_numbers("--box", text, "x1,y1,x2,y2") for text in boxes),
        tuple(_numbers("--point", text, "x,y") for text in points),
        None if mask is None else Path(mask),
        threshold,
        coarse_masks,
    )


def _numbers(option: str, text: str, names: str) -> tuple[float, ...]:
    """Read comma-separated numbers and a label, 1 where none is given."""
    wrong = PredictError(f"{option} {text}: expected {names} in pixels and, where wanted, a label 1 or 0 behind it")
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise wrong from error
    return labelled(numbers, names.count(",") + 1, wrong)


def labelled(numbers: list[float], count: int, wrong: PredictError) -> tuple[float, ...]:
    """Return `count` numbers and their label, 1 where none is given; raise `wrong` for anything else."""
    *numbers, label = numbers if len(numbers) > count else [*numbers, 1]
    if len(numbers) != count or label not in (0, 1) or not all(map(math.isfinite, numbers)):
        raise wrong
    return (*map(float, numbers), int(label))


def refuse_swapped(model: str, source: str) -> None:
    """Refuse an image or video in the place of the model, or the other way round.

    Raises:
        PredictError: they are; the message names the one that comes first.
    """
    if Path(model).suffix.lower() in MEDIA and not Path(model).is_dir():
        raise PredictError(
            f"MODEL: {model} is an image or a video; the model comes first: effsam3 predict {source} {model}"
        )
    if not _is_model(source):
        return
    # Only where the other one is no model either: two models are another mistake.
    swapped = Path(model).is_dir() and not _is_model(model)
    remedy = f"the model comes first: effsam3 predict {source} {model}" if swapped else "name an image or a video"
    raise PredictError(f"INPUT: {source} is a model, expected an image, a video or a folder of frames; {remedy}")


def _is_model(path: str) -> bool:
    return Path(path).suffix in MODEL_FILES or any((Path(path) / name).is_file() for name in IN_MODELS)
