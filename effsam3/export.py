# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: write a model as files for other runtimes, each compared with PyTorch before it is kept.

effsam3 export runs/stage1-image-es_rv_m --to onnx           ONNX, float32
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from effsam3.files import atomic_folder, refuse_unwritable, write_json
from effsam3.models.exporting.flow import SECOND, TRACED, flow
from effsam3.models.exporting.fold import fold
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.onnx_files import SHARE, OnnxPart, differences, refuse_difference, write_onnx
from effsam3.models.exporting.parts import DYNAMIC, Part, parts_of
from effsam3.models.exporting.tokenizer import portable_tokenizer
from effsam3.predictor import load_model
from effsam3.training.report import provenance, table


def run(model: str, to: str = "onnx", out: str | None = None) -> Path:
    """Export the parts of a model and `export.json`, which describes and measures them; returns their folder.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        out: the folder; None: exports/<name of the model>-<to>.

    Raises:
        PredictError, ChassisError: there is no such model, or it is not whole.
        ExportError: a file computes something else than PyTorch.
    """
    target = Path("exports") / f"{name_of(model)}-{to}" if out is None else Path(out)
    refuse_unwritable(target, "--out")
    whole: Any = load_model(model)
    folded = fold(whole)
    for part, (before, after, drift) in folded.items():
        print(f"{part}: {before - after} of {before} BatchNorms folded, output moved by {drift:.1e} of its range")
    parts = parts_of(whole) + memory_parts(whole)
    with atomic_folder(target) as folder:
        portable_tokenizer().save(str(folder / "tokenizer.json"))
        checks = write_parts(parts, folder)
        about = {
            "model": model,
            "to": to,
            "image_size": whole.tracker_model.config.image_size,
            "pixels": "the whole image resized to image_size squared; (value 0..255 - 127.5) / 127.5",
            "provenance": provenance(),
            "runtime": version("onnxruntime"),
            "folded": {part: found._asdict() for part, found in folded.items()},
            "largest_difference_allowed": SHARE,
            "dynamic_axes": DYNAMIC,
            "parts": {part.name: describe(part, folder) | checks[part.name] for part in parts},
        }
        write_json(folder / "export.json", about)
    print(as_table(about["parts"]))
    print(f"see {target}/export.json")
    return target


def write_parts(parts: list[Part], folder: Path) -> dict[str, dict]:
    """Write and check all parts; returns the largest difference of each output by part, a share of its range.

    Raises:
        ExportError: a file computes something else, or does not run at other lengths of its axes.
    """
    shares: dict[str, dict[str, float]] = {part.name: dict.fromkeys(part.outputs, 0.0) for part in parts}
    for lengths in (TRACED, SECOND):
        for example in flow(parts, lengths):
            path, own = folder / file_of(example.part), shares[example.part.name]
            if lengths is TRACED:
                write_onnx(example, path)
            for name, found in differences(example, OnnxPart(path)(example.inputs)).items():
                own[name] = max(own[name], found)
            refuse_difference(example.part.name, own)
    return {name: {"largest_difference": found} for name, found in shares.items()}


def file_of(part: Part) -> str:
    return f"{part.name}.onnx"


def name_of(model: str) -> str:
    """Return how a model is called in the name of a folder."""
    path = Path(model)
    return path.parent.name if path.name == "merged" else path.stem if path.is_file() else path.name


def describe(part: Part, folder: Path) -> dict[str, Any]:
    """Return what `export.json` says of a part."""
    # Weights above 2 GB lie in a file of their own.
    files = sorted(path.name for path in folder.glob(f"{file_of(part)}*"))
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
