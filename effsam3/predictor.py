# SPDX-License-Identifier: Apache-2.0
"""A whole SAM 3, its students included, that finds things on images and in videos; nothing is written.

    predictor = Predictor("runs/stage1-image-es_rv_m")
    predictor.image("photo.jpg", text="a dog").masks_OHW              every dog
    predictor.image("photo.jpg", box=[80, 40, 210, 300]).masks_OHW    the object in the box
    for frame, found in predictor.video("walk.mp4", text=["a dog", "a leash"]): ...

Letters: O instances or objects, H W rows and columns of the original image, S side of the model's square image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert
from transformers import PreTrainedModel, Sam3TrackerVideoModel

from effsam3.data.coco import rles_of
from effsam3.data.transforms import normalise, resize_image
from effsam3.inputs import Frames, read_image, read_video
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import PickledError
from effsam3.models.chassis.tensors import ChassisError
from effsam3.models.inference import concepts
from effsam3.models.inference.concepts import ConceptModel, Instances
from effsam3.models.inference.prompt_options import Asked, PredictError, labelled
from effsam3.models.inference.prompted import Prompts, load_tracker, shown_masks, tracked_masks, tracker_within
from effsam3.models.merging.slots import first_chassis, read_card
from effsam3.models.registry import is_made_up
from effsam3.models.text.tokens import TextTooLong, Tokenizer

IMAGE_THRESHOLD = 0.5


def load_model(model: str | Path, revision: str | None = None) -> PreTrainedModel:
    """Load a whole SAM 3, whichever of its parts are students: float32, in eval mode, on the CPU.

    `detector_model` finds concepts on images, as SAM 3 does: the geometry encoder runs also where there are no boxes.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        revision: of a Hub id: branch, tag or commit.

    Raises:
        PredictError: there is no such model.
        ChassisError: it is not whole, or has tensors that are not finite.
    """
    return concepts.load_model(model_folder(str(model), revision))


class Predictor:
    """Finds all instances of a text, or the objects that boxes, points or a mask show.

    Prompts are in pixels of the original and named as the options of `effsam3 predict`, by which errors call them.
    """

    def __init__(self, model: str | Path, revision: str | None = None, device: torch.device | str | None = None):
        """Find a model; it is loaded by the first question.

        Args:
            model, revision: as for `load_model`.
            device: such as cuda, cuda:1, mps or cpu; None: a GPU of NVIDIA's, AMD's or Apple's, where there is one.

        Raises:
            PredictError: there is no such model, or no such device.
        """
        self.folder = model_folder(str(model), revision)
        self.made_up = made_up(str(model), self.folder)
        self.device = usable_device(device)

    @cached_property
    def concepts(self) -> ConceptModel:
        """The model that texts need; it holds all that boxes, points and masks need, too."""
        self.__dict__.pop("tracker", None)  # one that was loaded alone
        return ConceptModel(self.folder, self.device)

    @cached_property
    def tracker(self) -> Sam3TrackerVideoModel:
        """The model that boxes, points and masks need: a part of the other one, where that is loaded."""
        if "concepts" in self.__dict__:
            return tracker_within(self.concepts.model)
        return torch.nn.Module.to(load_tracker(self.folder), self.device)

    def image(
        self,
        image: str | Path | Image.Image | np.ndarray,
        text: str | Sequence[str] = (),
        box: Sequence = (),
        point: Sequence = (),
        threshold: float | None = None,
        coarse_masks: bool = False,
    ) -> Instances:
        """Find instances on an image.

        Args:
            image: a file, or RGB as PIL's or as uint8 (H, W, 3).
            text: finds all instances; or several texts, each of which does.
            box: x1, y1, x2, y2 of an object, or with a text an example, with a fifth number 0 of what is not meant; or
                several of them.
            point: x, y on the object, with a third number 0 next to it; or several of one object.
            threshold: score from which an instance of a text counts; None: 0.5.
            coarse_masks: compute every second row and column of a text's masks only: fewer operations.

        Returns:
            The instances: of a text best first, objects as they were shown. `masks_OHW` are bool and as large as the
            image.

        Raises:
            PredictError: prompts that do not go together or lie outside the image, or no image.
            ChassisError: the model is not whole.
        """
        if isinstance(image, (str, Path)):
            image_HW3 = read_image(image)
        else:
            image_HW3 = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
            raise PredictError(
                f"image is {image_HW3.dtype} of {image_HW3.shape}; expected uint8 of (height, width, 3)"
            )
        asked = Asked(_list(text), _rows(box, 4), _rows(point, 2), None, threshold, coarse_masks)
        # Before the model is loaded, which takes many seconds.
        refuse_misfit(asked, False, image_HW3.shape[:2])
        return together(list(self.on_image(image_HW3, asked)))

    def video(
        self,
        video: str | Path | int,
        text: str | Sequence[str] = (),
        box: Sequence = (),
        point: Sequence = (),
        mask: str | Path | None = None,
        threshold: float | None = None,
    ) -> Iterator[tuple[int, Instances]]:
        """Find and track instances through a video; yields (number of the frame, instances) frame by frame.

        Args:
            video: a file, a folder of frames, or the number of a webcam.
            text: as for `image`.
            box, point: as for `image`: objects on the first frame.
            mask: a PNG of the first frame's size in which every value above 0 is one object.
            threshold: score from which a new instance is tracked; None: as the model's config says (SAM 3: 0.7).

        Raises:
            PredictError: prompts that do not go together or lie outside the video, or no video.
            ChassisError: the model is not whole.
        """
        opened = read_video(video)
        asked = Asked(_list(text), _rows(box, 4), _rows(point, 2), None if mask is None else Path(mask), threshold)
        refuse_misfit(asked, True, tuple(opened.size))
        return ((index, found) for index, found, _, _ in self.on_video(opened, asked))

    def on_image(self, image_HW3: np.ndarray, asked: Asked) -> Iterator[Instances]:
        """Yield the instances of each text, or once the objects that are shown; of prompts that fit the image."""
        size = image_HW3.shape[:2]
        if not asked.texts:
            pixels_3SS = normalise(resize_image(image_HW3, self.tracker.config.image_size, "square")[0])
            yield of_prompts(*shown_masks(self.tracker, pixels_3SS, size, shown(asked, size)))
            return
        levels = self.concepts.look(image_HW3, asked.coarse_masks)
        threshold = IMAGE_THRESHOLD if asked.threshold is None else asked.threshold
        boxes = torch.tensor([box[:4] for box in asked.boxes]) if asked.boxes else None
        positive = torch.tensor([box[4] == 1 for box in asked.boxes]) if asked.boxes else None
        yield from self.concepts.find_each(levels, size, asked.texts, boxes, positive, threshold)

    def on_video(
        self, video, asked: Asked, most: int | None = None
    ) -> Iterator[tuple[int, Instances, np.ndarray, float]]:
        """Yield (frame, instances, image_HW3, seconds) of the texts, or of what is shown on the first frame.

        `most`: frames that are read; None: all.
        """
        size = tuple(video.size)
        found: Iterator[tuple[int, Instances]]
        if asked.texts:
            frames = Frames(video, self.concepts.model.config.tracker_config.image_size, most)
            found = self.concepts.follow(frames, size, list(asked.texts), asked.threshold)
        else:
            frames = Frames(video, self.tracker.config.image_size, most)
            tracked = tracked_masks(self.tracker, frames, size, shown(asked, size))
            found = ((index, of_prompts(masks_OHW, scores_O)) for index, masks_OHW, scores_O in tracked)
        return ((index, instances, *frames.take(index)) for index, instances in found)


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """Return a device, or the best one that is there: CUDA (or ROCm), Apple's MPS, the CPU.

    Raises:
        PredictError: there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, is_there in there.items() if is_there))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise PredictError(f"--device {device}: expected one of {', '.join(there)}, such as cuda:1") from error
    if not there.get(chosen.type, True) or chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        usable = ", ".join(name for name, is_there in there.items() if is_there)
        raise PredictError(f"--device {device} is not there; this machine has {usable}")
    return chosen


# ---- prompts


def _list(text: str | Sequence[str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)


def _rows(numbers: Sequence, count: int) -> tuple[tuple[float, ...], ...]:
    """Return one prompt or several as rows of `count` numbers, each with its label, 1 where none is given.

    Raises:
        PredictError: other counts of numbers.
    """
    rows = [list(row) for row in ([numbers] if len(numbers) and np.ndim(numbers[0]) == 0 else numbers)]
    expected = f"expected {count} numbers in pixels and, where wanted, a label 1 or 0"
    return tuple(labelled(row, count, PredictError(f"{row}: {expected}")) for row in rows)


def refuse_misfit(asked: Asked, is_video: bool, size: tuple[int, int]) -> None:
    """Refuse prompts that the input cannot take.

    Raises:
        PredictError: they lie outside the image or are shares of it, are too long, or are for an image where there
            is a video.
    """
    height, width = size
    for *box, label in asked.boxes:
        # Nobody shows a single pixel: these are shares of the sides, as some other tools have them.
        if max(box) <= 1:
            raise _in_pixels("--box", box, label, size)
    for *point, label in asked.points:
        if max(point) <= 1 and any(value % 1 for value in point):
            raise _in_pixels("--point", point, label, size)
    for x1, y1, x2, y2, _ in asked.boxes:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise PredictError(
                f"--box {x1:g},{y1:g},{x2:g},{y2:g} is not a box in an image of {width}x{height} px; expected x1 < x2 "
                f"from 0 to {width}, y1 < y2 from 0 to {height}"
            )
    for x, y, _ in asked.points:
        if not (0 <= x < width and 0 <= y < height):
            raise PredictError(f"--point {x:g},{y:g} lies outside the image, which is {width}x{height} px")
    try:
        Tokenizer().tokenize_whole(list(asked.texts))
    except TextTooLong as error:
        raise PredictError(f"--text: {error}") from error
    if is_video and asked.texts and asked.boxes:
        raise PredictError(
            "example boxes are for images; give a video only --text, or only --box to track what it shows"
        )
    if is_video and asked.coarse_masks:
        raise PredictError(
            "--coarse-masks is for images: transformers follows texts through videos, and knows no such masks; leave "
            "it out"
        )
    if not is_video and asked.mask is not None:
        raise PredictError("--mask shows objects on the first frame of a video; an image takes --text, --box, --point")


def _in_pixels(option: str, shares: list[float], label: float, size: tuple[int, int]) -> PredictError:
    """Say that pixels are expected where shares of the image's sides were given."""
    sides = [size[1], size[0]] * 2
    pixels = ",".join(f"{share * side:.0f}" for share, side in zip(shares, sides[: len(shares)], strict=True))
    given = ",".join(f"{share:g}" for share in shares)
    return PredictError(
        f"{option} {given}: expected pixels; as shares of an image of {size[1]}x{size[0]} px that is {option} {pixels}"
        f"{'' if label else ',0'}"
    )


def shown(asked: Asked, size: tuple[int, int]) -> Prompts:
    """Return the boxes and points, or the mask, as the tracker takes them.

    Raises:
        PredictError: the mask is not of the video's size, or empty.
    """
    if asked.mask is not None:
        return Prompts(masks_OHW=read_masks(asked.mask, size))
    boxes = torch.tensor([box[:4] for box in asked.boxes]) if asked.boxes else None
    if not asked.points:
        return Prompts(boxes_O4=boxes)
    points = torch.tensor([point[:2] for point in asked.points])
    return Prompts(boxes, points, torch.tensor([point[2] for point in asked.points], dtype=torch.int))


def read_masks(path: Path, size: tuple[int, int]) -> Tensor:
    """Read objects (O, H, W), bool, from a PNG in which every value above 0 is one object, in order of the values.

    Raises:
        PredictError: no such file, no such size, no objects.
    """
    try:
        image = Image.open(path)
        values_HW = np.array(image)
    except OSError as error:
        raise PredictError(f"--mask {path} cannot be read ({error})") from error
    if values_HW.shape != tuple(size):
        raise PredictError(
            f"--mask {path} is {image.mode} of {image.width}x{image.height} px; expected one value per pixel (a grey "
            f"or palette PNG) of the video's size, {size[1]}x{size[0]}"
        )
    # Any values count, so that a palette PNG of ids and a plain black and white one both work.
    numbers = [value for value in np.unique(values_HW) if value]
    if not numbers:
        raise PredictError(f"--mask {path} is empty; every value above 0 is an object")
    return torch.from_numpy(np.stack([values_HW == value for value in numbers]))


# ---- the model


def model_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder of MODEL in transformers' format.

    Raises:
        PredictError: there is none.
    """
    try:
        return chassis_folder(model, revision)
    except (ChassisError, PickledError) as error:
        raise PredictError(f"MODEL: {str(error).removeprefix('sam3.checkpoint: ')}") from error


def made_up(model: str, folder: Path) -> bool:
    """Return whether the weights around the students are random."""
    if (folder / CARD).is_file():
        model, _ = first_chassis(read_card(folder))
    return is_made_up(model)


# ---- instances and frames


def together(found: Sequence[Instances]) -> Instances:
    """Return the instances of several texts as one, renumbered."""
    if len(found) == 1:
        return found[0]
    texts = [text for one in found for text in one.texts]
    tensors = {
        name: torch.cat([getattr(one, name) for one in found]) for name in ("masks_OHW", "boxes_O4", "scores_O")
    }
    return Instances(**tensors, ids=list(range(1, len(texts) + 1)), texts=texts)


def of_prompts(masks_OHW: Tensor, scores_O: Tensor) -> Instances:
    """Return the objects that were shown as instances: numbered from 1, their boxes around their masks."""
    # The box is the mask's own, also where a box was shown: what was found is what is told.
    rles = rles_of(masks_OHW.numpy())
    boxes_O4 = box_convert(torch.from_numpy(coco_mask.toBbox(rles)), "xywh", "xyxy")
    return Instances(masks_OHW, boxes_O4, scores_O, list(range(1, len(masks_OHW) + 1)), [""] * len(masks_OHW))
