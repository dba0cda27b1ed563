# SPDX-License-Identifier: Apache-2.0
"""The verb `predict`: find or track things on an image or in a video, and write pictures, masks and numbers.

effsam3 predict runs/stage1-image-es_rv_m photo.jpg --text "a dog"              every dog
effsam3 predict runs/stage1-image-es_rv_m photo.jpg --box 80,40,210,300         the object in the box
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --text "a dog" --text "a leash"
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --point 200,140             the object shown on the first frame
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from effsam3.data.sa1b import decode_image
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.video_files import VIDEO_EXTENSIONS, open_video
from effsam3.errors import UserError
from effsam3.models.concepts import ConceptModel, Instances
from effsam3.models.prompted import Prompts, load_tracker, shown_masks, tracked_masks
from effsam3.models.sam3 import ChassisError, chassis_folder
from effsam3.models.slots import CARD, first_chassis, read_card
from effsam3.models.tiny import MADE_UP
from effsam3.models.tokens import TextTooLong, Tokenizer
from effsam3.prediction_files import records, write_image, write_video

IMAGE_THRESHOLD = 0.5


class PredictError(UserError):
    """A prompt that fits neither the model nor the input, or an input that cannot be read."""


@dataclass(frozen=True)
class Asked:
    """The prompts of the command line, checked against one another but not yet against the input."""

    texts: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]  # x1, y1, x2, y2 and 1, or 0 for an example of what is not meant
    points: tuple[tuple[float, ...], ...]  # x, y and 1 on the object, or 0 beside it
    mask: Path | None
    threshold: float | None

    def as_json(self) -> dict:
        """What predictions.json says was asked for."""
        found = {"texts": self.texts, "boxes": self.boxes, "points": self.points, "threshold": self.threshold}
        found["mask"] = None if self.mask is None else str(self.mask)
        return {name: value for name, value in found.items() if value not in (None, ())}


def run(model: str, source: str, asked: Asked, out: str | None = None) -> Path:
    """Predict and write predictions.json, overlay.png and, for an image, mask_NNN.png; returns their folder.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        source: an image, a video or a folder of frames.
        out: the folder; None: predictions/<name of the source>.

    Raises:
        PredictError: as the class says.
        ChassisError: a model that is not whole.
    """
    path = Path(source)
    if not path.exists():
        raise PredictError(f"INPUT: there is no {path}; expected an image, a video or a folder of frames")
    is_video = path.is_dir() or path.suffix.lower() in VIDEO_EXTENSIONS
    if is_video:
        video = open_video(path)
        size = tuple(video.size)
    else:
        image_HW3, _ = decode_image(path.read_bytes(), key=str(path))
        size = image_HW3.shape[:2]
    refuse_misfit(asked, is_video, size)
    folder = model_folder(model)
    target = Path("predictions") / path.stem if out is None else Path(out)
    if target.exists() and not target.is_dir():
        raise PredictError(f"--out {target} is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "input": source, "size": list(size), "prompts": asked.as_json()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_video:
        found = on_video(folder, video, size, asked, device)
        write_video(target, about, found, Images(video))
    else:
        found = {0: on_image(folder, image_HW3, asked, device)}
        write_image(target, about, image_HW3, found[0])
    print(f"{summarise(found)}; see {target}/overlay.png, {target}/predictions.json")
    if made_up(model, folder):
        print("This model has random weights: what it finds means nothing.")
    return target


def summarise(found: dict[int, list[dict]]) -> str:
    """How many instances there are, in how many frames."""
    count = len({instance["id"] for instances in found.values() for instance in instances})
    noun = "instance" if count == 1 else "instances"
    return f"{count} {noun}" + (f" in {len(found)} frames" if len(found) > 1 else "")


# ---- what is asked for


def parse(
    texts: Sequence[str], boxes: Sequence[str], points: Sequence[str], mask: str | None, threshold: float | None
) -> Asked:
    """Read the prompts of the command line.

    Raises:
        PredictError: no prompt, an empty one, or prompts that do not go together.
    """
    asked = Asked(
        texts=tuple(text.strip() for text in texts),
        boxes=tuple(_numbers("--box", text, ("x1", "y1", "x2", "y2")) for text in boxes),
        points=tuple(_numbers("--point", text, ("x", "y")) for text in points),
        mask=None if mask is None else Path(mask),
        threshold=threshold,
    )
    if not (texts or boxes or points or mask):
        raise PredictError("nothing to look for; give --text, --box, --point or, for a video, --mask")
    if "" in asked.texts:
        raise PredictError('--text is empty; say what to look for, such as --text "a dog"')
    if asked.texts and (asked.points or asked.mask):
        raise PredictError("--text finds all instances, --point and --mask show one object; give one or the other")
    if len(asked.texts) > 1 and asked.boxes:
        raise PredictError("boxes are examples of the one text that they come with; give a single --text")
    if not asked.texts and any(box[4] == 0 for box in asked.boxes):
        raise PredictError(
            "a box with label 0 is an example of what --text does not mean; without --text it says nothing"
        )
    if asked.points and len(asked.boxes) > 1:
        raise PredictError("points show one object, for which there can be one --box; boxes alone show one each")
    if asked.points and all(label == 0 for _, _, label in asked.points) and not asked.boxes:
        raise PredictError(
            "every point has label 0, beside the object; give a point on it (label 1) or a box around it"
        )
    if asked.mask is not None and (asked.boxes or asked.points):
        raise PredictError("--mask shows the objects already; give it alone")
    if threshold is not None and not 0 <= threshold < 1:
        raise PredictError(f"--threshold {threshold}: a score is from 0 to 1")
    if threshold is not None and not asked.texts:
        raise PredictError("--threshold is for the instances that --text finds; what is shown is always segmented")
    return asked


def _numbers(option: str, text: str, names: tuple[str, ...]) -> tuple[float, ...]:
    """Read comma-separated numbers and a label, 1 where none is given."""
    expected = f"expected {','.join(names)} in pixels and, where wanted, a label 1 or 0 behind it"
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise PredictError(f"{option} {text}: {expected}") from error
    if len(numbers) == len(names):
        numbers = (*numbers, 1.0)
    if len(numbers) != len(names) + 1 or numbers[-1] not in (0, 1) or not np.isfinite(numbers).all():
        raise PredictError(f"{option} {text}: {expected}")
    return (*numbers[:-1], int(numbers[-1]))


def refuse_misfit(asked: Asked, is_video: bool, size: tuple[int, int]) -> None:
    """Refuse prompts that the input cannot take.

    Raises:
        PredictError: they lie outside the image, are too long, or are for an image where there is a video.
    """
    height, width = size
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
            "example boxes are for images; give a video --text alone, or --box alone to track what it shows"
        )
    if not is_video and asked.mask is not None:
        raise PredictError("--mask shows objects on the first frame of a video; an image takes --text, --box, --point")


def shown(asked: Asked, size: tuple[int, int]) -> Prompts:
    """The boxes and points, or the mask, as the tracker takes them.

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
    numbers = [value for value in np.unique(values_HW) if value]
    if not numbers:
        raise PredictError(f"--mask {path} is empty; every value above 0 is an object")
    return torch.from_numpy(np.stack([values_HW == value for value in numbers]))


# ---- the model


def model_folder(model: str) -> Path:
    """The folder of MODEL in transformers' layout.

    Raises:
        PredictError: there is none.
    """
    try:
        return chassis_folder(model)
    except ChassisError as error:
        raise PredictError(f"MODEL: {str(error).removeprefix('sam3.checkpoint: ')}") from error


def made_up(model: str, folder: Path) -> bool:
    """Whether the weights around the students are random."""
    if (folder / CARD).is_file():
        model, _ = first_chassis(read_card(folder))
    return model in MADE_UP


def on_image(folder: Path, image_HW3: np.ndarray, asked: Asked, device: torch.device) -> list[dict]:
    """Records of all instances of the texts, or of the objects that boxes and points show."""
    size = image_HW3.shape[:2]
    if not asked.texts:
        tracker = load_tracker(folder).to(device)
        pixels_3SS = normalise(resize_image(image_HW3, tracker.config.image_size, "square")[0])
        return records(of_prompts(*shown_masks(tracker, pixels_3SS, size, shown(asked, size))))
    model = ConceptModel(folder, device)
    vision = model.look(image_HW3)
    threshold = IMAGE_THRESHOLD if asked.threshold is None else asked.threshold
    boxes = torch.tensor([box[:4] for box in asked.boxes]) if asked.boxes else None
    positive = torch.tensor([box[4] == 1 for box in asked.boxes]) if asked.boxes else None
    found = [
        record
        for text in asked.texts
        for record in records(model.find(vision, size, text, boxes, positive, threshold))
    ]
    return [record | {"id": number} for number, record in enumerate(found, 1)]


def on_video(folder: Path, video, size: tuple[int, int], asked: Asked, device: torch.device) -> dict[int, list[dict]]:
    """{frame: records} of all instances of the texts, or of what is shown on the first frame."""
    if asked.texts:
        model = ConceptModel(folder, device)
        frames = Frames(video, model.model.config.tracker_config.image_size)
        steps = model.follow(frames, size, list(asked.texts), asked.threshold)
    else:
        prompts = shown(asked, size)
        tracker = load_tracker(folder).to(device)
        frames = Frames(video, tracker.config.image_size)
        tracked = tracked_masks(tracker, frames, size, prompts)
        steps = ((index, of_prompts(masks, scores)) for index, masks, scores in tracked)
    bar = tqdm(steps, total=len(frames), unit="frame", disable=None)
    return {index: records(found) for index, found in bar}


def of_prompts(masks_OHW: Tensor, scores_O: Tensor) -> Instances:
    """The objects that were shown as instances: numbered from 1, their boxes around their masks."""
    rles = coco_mask.encode(np.asfortranarray(masks_OHW.numpy().transpose(1, 2, 0), dtype=np.uint8))
    boxes_O4 = box_convert(torch.from_numpy(coco_mask.toBbox(rles)), "xywh", "xyxy")
    return Instances(masks_OHW, boxes_O4, scores_O, list(range(1, len(masks_OHW) + 1)), [""] * len(masks_OHW))


class Images(Sequence):
    """A video's frames, uint8 RGB (H, W, 3), decoded when they are asked for."""

    def __init__(self, video):
        self.video = video

    def __len__(self) -> int:
        return self.video.frames

    def __getitem__(self, index: int) -> np.ndarray:
        image_HW3 = np.ascontiguousarray(self.video.read([index])[0].transpose(1, 2, 0))
        if image_HW3.shape[:2] != tuple(self.video.size):
            height, width = image_HW3.shape[:2]
            raise PredictError(
                f"INPUT: frame {index} is {width}x{height} px, the first {self.video.size[1]}x{self.video.size[0]}; "
                "the frames of a video have one size"
            )
        return image_HW3


class Frames(Images):
    """The same as the model takes them: normalised pixels (3, S, S)."""

    def __init__(self, video, side: int):
        super().__init__(video)
        self.side = side

    def __getitem__(self, index: int) -> Tensor:
        return normalise(resize_image(super().__getitem__(index), self.side, "square")[0])
