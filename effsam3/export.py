# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: write a model as files for other runtimes, each compared with PyTorch before it is kept.

effsam3 export runs/stage1-image-es_rv_m                                         ONNX, float32
effsam3 export runs/stage1-image-es_rv_m --to openvino
effsam3 export runs/stage1-image-es_rv_m --precision int8 --calibrate photos     its convolutions in int8
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from effsam3.data.transforms import normalise, resize_image
from effsam3.errors import UserError
from effsam3.files import atomic_folder, refuse_unwritable, write_json
from effsam3.models.exporting.flow import SECOND, TRACED, flow
from effsam3.models.exporting.fold import fold
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.onnx_files import SHARE, OnnxPart, differences, refuse_difference, write_onnx
from effsam3.models.exporting.parts import DYNAMIC, Part, parts_of
from effsam3.models.exporting.precision import QUANTISED, Run, agreement, in_pytorch, inputs_of, to_fp16, to_int8
from effsam3.models.exporting.tokenizer import portable_tokenizer
from effsam3.predictor import load_model, read_image
from effsam3.training.report import provenance, table

ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MOST_IMAGES = 32  # of --calibrate: more change the ranges little


def run(
    model: str, to: str = "onnx", out: str | None = None, precision: str = "fp32", calibrate: str | None = None
) -> Path:
    """Export the parts of a model and `export.json`, which describes and measures them; returns their folder.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        to: onnx or openvino.
        out: the folder; None: exports/<name of the model>-<to>, and the precision if it is not fp32.
        precision: fp32, fp16 or, of ONNX's convolutions, int8.
        calibrate: a folder of images; int8 takes its ranges from them, and all precisions are compared on them.

    Raises:
        UserError: int8 for another runtime or without images; no images in the folder; other files in `out`.
        PredictError, ChassisError: there is no such model, or it is not whole.
        ExportError: a file computes something else than PyTorch.
    """
    refuse_misfit(to, precision, calibrate)
    files = image_files(calibrate)
    name = "-".join([name_of(model), to, *([precision] if precision != "fp32" else [])])
    target = Path("exports") / name if out is None else Path(out)
    refuse_unwritable(target, "--out")
    if target.is_dir() and any(target.iterdir()) and not (target / "export.json").is_file():
        raise UserError(f"--out: {target} holds files of something else than an export; name another folder")
    whole: Any = load_model(model)
    side = whole.tracker_model.config.image_size
    images = [normalise(resize_image(read_image(file), side, "square")[0])[None] for file in files]
    folded = fold(whole)
    for part, (before, after, drift) in folded.items():
        print(f"{part}: {before - after} of {before} BatchNorms folded, output moved by {drift:.1e} of its range")
    parts = parts_of(whole) + memory_parts(whole)
    with atomic_folder(target) as folder:
        portable_tokenizer().save(str(folder / "tokenizer.json"))
        checks = write_parts(parts, folder, to, precision, images)
        about: dict[str, Any] = {
            "model": model,
            "to": to,
            "precision": precision,
            "image_size": side,
            "pixels": "the whole image resized to image_size squared; (value 0..255 - 127.5) / 127.5",
            "provenance": provenance(),
            "runtime": version("onnxruntime" if to == "onnx" else to),
            "folded": {part: found._asdict() for part, found in folded.items()},
            "largest_difference_allowed": SHARE if precision == "fp32" else None,
            "dynamic_axes": DYNAMIC,
            "parts": {part.name: describe(part, folder, to) | checks[part.name] for part in parts},
        }
        if images:
            exported = in_files(folder, to)
            about["masks_by_box"] = agreement(in_pytorch(parts), exported, images)
        write_json(folder / "export.json", about)
    print(as_table(about["parts"]))
    if images:
        found = about["masks_by_box"]
        print(
            f"masks of {found['masks']} boxes on {len(images)} images agree with PyTorch's by a mean IoU of "
            f"{found['mean_iou']:.4f} (lowest {found['lowest_iou']:.4f})"
        )
    print(f"see {target}/export.json")
    return target


def refuse_misfit(to: str, precision: str, calibrate: str | None) -> None:
    """Refuse precisions that a runtime has not, or that need images.

    Raises:
        UserError: one of these.
    """
    if precision == "int8" and to != "onnx":
        raise UserError(f"--precision int8 is for --to onnx; for {to} give fp16 or fp32")
    if precision == "int8" and calibrate is None:
        raise UserError(
            "--precision int8 needs images to take its ranges from: --calibrate FOLDER, some 30 photographs"
        )


def image_files(folder: str | None) -> list[Path]:
    """Return the images of a folder, at most `MOST_IMAGES`.

    Raises:
        UserError: there are none.
    """
    if folder is None:
        return []
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise UserError(f"--calibrate {folder}: no image ({', '.join(IMAGES)}) in this folder")
    return found[:: max(1, len(found) // MOST_IMAGES)][:MOST_IMAGES]


def write_parts(
    parts: list[Part], folder: Path, to: str, precision: str, images: list[Tensor]
) -> dict[str, dict[str, Any]]:
    """Write and check all parts; returns the largest difference of each output by part, a share of its range.

    Raises:
        ExportError: a file computes something else, or does not run at other lengths of its axes.
    """
    shares: dict[str, dict[str, float]] = {part.name: dict.fromkeys(part.outputs, 0.0) for part in parts}
    for lengths in (TRACED, SECOND):
        for example in flow(parts, lengths):
            part = example.part
            if lengths is TRACED:
                path = folder / f"{part.name}.onnx"
                write_onnx(example, path)
                if precision == "fp16" and to == "onnx":
                    to_fp16(path)
                if precision == "int8" and part.name in QUANTISED:
                    to_int8(part, path, inputs_of(part, parts, images))
                if to == "openvino":
                    from effsam3.models.exporting.openvino_files import write_openvino

                    write_openvino(path, path.with_suffix(ENDINGS[to]), half=precision == "fp16")
                    for onnx_file in folder.glob(f"{path.name}*"):
                        onnx_file.unlink()
            own = shares[part.name]
            for name, found in differences(example, file(folder, part.name, to)(example.inputs)).items():
                own[name] = max(own[name], found)
            # Fewer bits are asked for knowing that they differ: by how much is told, not judged.
            if precision == "fp32":
                refuse_difference(part.name, own)
    return {name: {"largest_difference": found} for name, found in shares.items()}


def file(folder: Path, name: str, to: str) -> Any:
    """Open a part's file in its runtime."""
    path = folder / f"{name}{ENDINGS[to]}"
    if to == "onnx":
        return OnnxPart(path)
    from effsam3.models.exporting.openvino_files import OpenVinoPart

    return OpenVinoPart(path)


def in_files(folder: Path, to: str) -> Run:
    """Return what runs the files, each opened once, for `agreement`."""
    opened = cache(lambda name: file(folder, name, to))
    return lambda name, known: opened(name)(known)


def name_of(model: str) -> str:
    """Return how a model is called in the name of a folder."""
    path = Path(model)
    return path.parent.name if path.name == "merged" else path.stem if path.is_file() else path.name


def describe(part: Part, folder: Path, to: str) -> dict[str, Any]:
    """Return what `export.json` says of a part."""
    # OpenVINO's weights, and ONNX's above 2 GB, lie in a file of their own.
    files = sorted(path.name for path in folder.glob(f"{part.name}.*"))
    return {
        "files": files,
        "bytes": sum((folder / name).stat().st_size for name in files),
        "inputs": dict(part.inputs),
        "outputs": dict(part.outputs),
    }


def as_table(parts: dict[str, dict]) -> str:
    rows = [
        [
            name,
            f"{part['bytes'] / 1e6:.1f}",
            ", ".join(part["inputs"]),
            f"{max(part['largest_difference'].values()):.1e}",
        ]
        for name, part in parts.items()
    ]
    return table(rows, ["part", "MB", "inputs", "largest difference of range"])
