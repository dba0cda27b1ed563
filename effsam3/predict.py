# SPDX-License-Identifier: Apache-2.0
"""The verb `predict`: find or track things on an image or in a video, and write pictures, masks and numbers.

effsam3 predict runs/stage1-image-es_rv_m photo.jpg --text "a dog"              every dog
effsam3 predict runs/stage1-image-es_rv_m photo.jpg --box 80,40,210,300         the object in the box
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --text "a dog" --text "a leash"
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --point 200,140             the object shown on the first frame
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from effsam3.benchmarks.pictures.predictions import records, write_image, write_video
from effsam3.data.images.sa1b import decode_image
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.videos.files import VIDEO_EXTENSIONS, open_video
from effsam3.files import refuse_unwritable
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import PickledError
from effsam3.models.chassis.tensors import ChassisError
from effsam3.models.inference.concepts import ConceptModel, Instances
from effsam3.models.inference.prompt_options import Asked, PredictError
from effsam3.models.inference.prompted import Prompts, load_tracker, shown_masks, tracked_masks
from effsam3.models.merging.slots import first_chassis, read_card
from effsam3.models.registry import is_made_up
from effsam3.models.text.tokens import TextTooLong, Tokenizer

IMAGE_THRESHOLD = 0.5


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
    target = Path("predictions") / path.stem if out is None else Path(out)
    refuse_unwritable(target, "--out")
    folder = model_folder(model)
    random = made_up(model, folder)
    about = {"model": model, "input": source, "size": list(size), "prompts": asked.as_json()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_video:
        found, best = on_video(folder, video, size, asked, device)
        target.mkdir(parents=True, exist_ok=True)
        write_video(target, about, found, Images(video))
    else:
        instances, best = on_image(folder, image_HW3, asked, device)
        target.mkdir(parents=True, exist_ok=True)
        found = {0: instances}
        write_image(target, about, image_HW3, found[0])
    print(f"{summarise(found, best)}; see {target}/overlay.png, {target}/predictions.json")
    if random:
        print("This model has random weights: what it finds means nothing.")
    return target


def summarise(found: dict[int, list[dict]], best: tuple[float, float] | None = None) -> str:
    """How many instances there are, in how many frames; where there is none, why.

    `best` is the best score of all candidates for the texts and the threshold; None: objects were shown.
    """
    listed = {instance["id"] for instances in found.values() for instance in instances}
    seen = {
        instance["id"]
        for instances in found.values()
        for instance in instances
        if coco_mask.area(instance["segmentation"])
    }
    text = f"{len(seen)} {'instance' if len(seen) == 1 else 'instances'}"
    text += f" in {len(found)} frames" if len(found) > 1 else ""
    if empty := len(listed - seen):
        text += f" ({empty} more {'has' if empty == 1 else 'have'} no pixel in any frame)"
    if not listed and best is not None:
        text += f": the best score is {best[0]:.3f}, --threshold {best[1]:g} asks for more"
    return text


# ---- what is asked for


def refuse_misfit(asked: Asked, is_video: bool, size: tuple[int, int]) -> None:
    """Refuse prompts that the input cannot take.

    Raises:
        PredictError: they lie outside the image or are shares of it, are too long, or are for an image where there
            is a video.
    """
    height, width = size
    for *box, label in asked.boxes:
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
    if not is_video and asked.mask is not None:
        raise PredictError("--mask shows objects on the first frame of a video; an image takes --text, --box, --point")


def _in_pixels(option: str, shares: list[float], label: int, size: tuple[int, int]) -> PredictError:
    """Say that pixels are expected where shares of the image's sides were given."""
    sides = [size[1], size[0]] * 2
    pixels = ",".join(f"{share * side:.0f}" for share, side in zip(shares, sides, strict=False))
    given = ",".join(f"{share:g}" for share in shares)
    return PredictError(
        f"{option} {given}: expected pixels; as shares of an image of {size[1]}x{size[0]} px that is {option} {pixels}"
        f"{'' if label else ',0'}"
    )


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
    """The folder of MODEL in transformers' format.

    Raises:
        PredictError: there is none.
    """
    try:
        return chassis_folder(model)
    except (ChassisError, PickledError) as error:
        raise PredictError(f"MODEL: {str(error).removeprefix('sam3.checkpoint: ')}") from error


def made_up(model: str, folder: Path) -> bool:
    """Whether the weights around the students are random."""
    if (folder / CARD).is_file():
        model, _ = first_chassis(read_card(folder))
    return is_made_up(model)


def on_image(
    folder: Path, image_HW3: np.ndarray, asked: Asked, device: torch.device
) -> tuple[list[dict], tuple[float, float] | None]:
    """Records of all instances of the texts, or of the objects that boxes and points show; for texts also the best
    score of all candidates and the threshold.
    """
    size = image_HW3.shape[:2]
    if not asked.texts:
        tracker = load_tracker(folder).to(device)
        pixels_3SS = normalise(resize_image(image_HW3, tracker.config.image_size, "square")[0])
        return records(of_prompts(*shown_masks(tracker, pixels_3SS, size, shown(asked, size)))), None
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
    return [record | {"id": number} for number, record in enumerate(found, 1)], (model.best_score, threshold)


def on_video(
    folder: Path, video, size: tuple[int, int], asked: Asked, device: torch.device
) -> tuple[dict[int, list[dict]], tuple[float, float] | None]:
    """{frame: records} of all instances of the texts, or of what is shown on the first frame; scores as `on_image`."""
    model = None
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
    found = {index: records(instances) for index, instances in bar}
    return found, None if model is None else (model.best_score, model.model.new_det_thresh)


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
