# SPDX-License-Identifier: Apache-2.0
"""Pictures worth looking at: image, teacher's and student's features in the same colours, their difference, masks.

Letters: C channels, G grid rows and columns, H W rows and columns of the original image, O objects.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from effsam3.benchmarks.masks import choose_annotations, embeddings_of, segment
from effsam3.benchmarks.models import Pair
from effsam3.benchmarks.pictures.drawing import Comparison, comparison_notes, paint
from effsam3.data.images.sa1b import mask_of, read_annotations, read_image
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.unreadable import Unreadable
from effsam3.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBJECTS = 6  # prompted per picture


def shared_pca(
    teacher_CGG: Tensor, student_CGG: Tensor, mean_C: Tensor, scale_C: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Show both feature maps as RGB (G, G, 3) in 0..1, by the teacher's three principal components.

    Channels are standardised first: else a few large ones would be all that one sees.
    """
    maps = [
        ((feat.cpu() - mean_C[:, None, None]) / scale_C[:, None, None]).flatten(1).T
        for feat in (teacher_CGG, student_CGG)
    ]
    centre = maps[0].mean(0)
    _, _, components = torch.linalg.svd(maps[0] - centre, full_matrices=False)
    colours = [(feat - centre) @ components[:3].T for feat in maps]
    # A few extreme positions would leave all others one colour; the teacher's range serves both, so that colours
    # compare.
    low, high = colours[0].quantile(0.02, 0), colours[0].quantile(0.98, 0)
    side = teacher_CGG.shape[-1]
    teacher, student = (((c - low) / (high - low)).clamp(0, 1).reshape(side, side, 3).numpy() for c in colours)
    return teacher, student


def draw(pair: Pair, index, folder: Path, count: int, out: Path, masks: bool) -> list[Path]:
    """Draw one PNG for each of the first `count` images of the index into `out`; return their paths.

    `masks` adds a second row: the annotated masks and what both models make of their boxes.
    """
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    mean_C, scale_C = pair.mean_C.cpu(), pair.deviation_C.cpu()
    paths = []
    for row in (index[position] for position in range(min(count, len(index)))):
        try:
            image = read_image(row, folder)
            annotations = read_annotations(row, folder) if masks else []
        except Unreadable:
            continue  # the benchmarks name it
        height, width = image.shape[:2]
        pixels = normalise(resize_image(image, pair.image_size, "square")[0])[None]
        teacher, student = (feat[0] for feat in pair.features(pixels))
        own, learned = ((feat.cpu() - mean_C[:, None, None]) / scale_C[:, None, None] for feat in (teacher, student))
        agreement = F.cosine_similarity(own, learned, dim=0)
        colours = shared_pca(teacher, student, mean_C, scale_C)
        panels = [("image", image), ("teacher features", colours[0]), ("student features", colours[1])]
        panels.append((f"agreement, mean {agreement.mean():.2f}", agreement.numpy()))
        if annotations:
            panels += _mask_panels(pair, annotations, image)
        rows = -(-len(panels) // 4)
        figure = Figure(figsize=(3.2 * 4, (3.2 * height / width + 0.3) * rows), layout="constrained", dpi=100)
        for axis, (title, content) in zip(figure.subplots(rows, 4).flat, panels, strict=False):
            shown = axis.imshow(
                content, cmap="magma", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest"
            )
            axis.set_title(title, fontsize=10)
            if content.ndim == 2:
                figure.colorbar(shown, ax=axis, shrink=0.75)
        for axis in figure.axes[: 4 * rows]:
            axis.set_axis_off()
        paths.append(out / f"{picture_name(row)}.png")
        notes = comparison_notes(_comparisons(figure, [title for title, _ in panels]))
        with atomic_file(paths[-1]) as file:
            figure.savefig(file, format="png", metadata=notes)
    return paths


def _comparisons(figure: Figure, titles: list[str]) -> list[Comparison]:
    """Return what a figure compares: of two panels with titles such as "teacher features" and "student features"."""
    figure.draw_without_rendering()  # only then it is known where panels are
    boxes = {}
    for title, axis in zip(titles, figure.axes, strict=False):
        (left, low), (right, high) = axis.get_window_extent().get_points().round().astype(int).tolist()
        boxes[title] = left, round(figure.bbox.height) - high, right, round(figure.bbox.height) - low
    pairs = [(title, title.replace("teacher", "student")) for title in titles if title.startswith("teacher")]
    return [Comparison(one.partition(" ")[2], {one: boxes[one], other: boxes[other]}) for one, other in pairs]


def picture_name(row: dict) -> str:
    """Return a file name for an image's picture: its key, of a key that is a path the last part and its digest."""
    key = PurePosixPath(row["key"])
    return key.name if len(key.parts) == 1 else f"{key.stem}-{row['image_digest'][:8]}"


def _mask_panels(pair: Pair, annotations: list[dict], image: np.ndarray) -> list[tuple[str, np.ndarray]]:
    height, width = image.shape[:2]
    annotations = choose_annotations(annotations, OBJECTS)
    truth = np.stack([mask_of(annotation, height, width) for annotation in annotations])

    def drawn(masks: np.ndarray) -> np.ndarray:
        by_number = dict(enumerate(masks, 1))
        return np.asarray(paint(image, by_number, by_number))

    panels = [("annotated masks", drawn(truth))]
    for name, model in pair.models.items():
        masks = segment(model, embeddings_of(model, image), annotations, "box", height, width).numpy()
        panels.append((f"{name}, box prompts", drawn(masks)))
    return panels
