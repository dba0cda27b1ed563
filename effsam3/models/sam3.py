# SPDX-License-Identifier: Apache-2.0
"""The chassis: a SAM 3 checkpoint as a local folder in transformers' layout, read part by part.

Whatever a recipe's `sam3.checkpoint` names (a Hub id, a local folder, `tiny`, `random`) becomes a folder first, so
that everything after this file is one code path.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

from effsam3.errors import UserError
from effsam3.models.tiny import MADE_UP
from effsam3.models.tokens import clip_tokenizer

TRUNK = "detector_model.vision_encoder.backbone."  # the slot `image`
NECK = "detector_model.vision_encoder.neck."  # the detector's FPN; the tracker has its own, `tracker_neck.`
SAM3_TRUNK_PARAMETERS = 446_236_672  # of facebook/sam3's ViT in transformers
# What a student's release inherits unchanged: image and video processors, tokenizer.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


class ChassisError(UserError):
    """A SAM 3 checkpoint that is missing, incomplete or not what it claims to be."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load reports and bars off the console: whoever calls checks the loading info and raises."""
    from transformers.utils import logging

    # Saving imports DeepSpeed, which else warns on every machine without a GPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def cache_folder() -> Path:
    """Where made-up chassis are kept: `$EFFSAM3_CACHE`, else `~/.cache/effsam3`."""
    return Path(os.environ.get("EFFSAM3_CACHE", Path.home() / ".cache" / "effsam3"))


def chassis_folder(checkpoint: str, revision: str | None = None) -> Path:
    """Return a local folder with the checkpoint in transformers' layout.

    `tiny` and `random` are made once, from a fixed seed, under the cache folder. A Hub id is downloaded.

    Raises:
        ChassisError: no such folder, or the Hub refuses it or is out of reach.
    """
    if checkpoint in MADE_UP:
        return _make(checkpoint)
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ChassisError(
                f"sam3.checkpoint: {folder} has no config.json; a checkpoint folder in transformers' layout has "
                "config.json and *.safetensors"
            )
        return folder
    if folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1:
        raise ChassisError(
            f"sam3.checkpoint: there is no folder {checkpoint}; expected a local folder, a Hub id such as "
            "facebook/sam3, `tiny` or `random`"
        )
    return _download(checkpoint, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=["*.safetensors", "*.json", "merges.txt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ChassisError(
            f"sam3.checkpoint: {repo_id} cannot be had from the Hub ({type(error).__name__}: {error}). facebook/sam3 "
            "is gated: ask for access on its page, then `hf auth login`; or name a local folder, or `tiny` for a trial"
        ) from error


def _make(name: str) -> Path:
    """Write the made-up chassis `name` under the cache folder, once; several processes may ask at the same time."""
    import transformers
    from transformers import Sam3VideoModel

    config = MADE_UP[name]()
    made_from = config.to_json_string() + transformers.__version__ + torch.__version__
    key = xxhash.xxh3_64_hexdigest(made_from.encode())
    folder = cache_folder() / f"{name}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sam3VideoModel(config)
        # Zero or uninitialised parameters would make whatever they multiply invisible to every comparison.
        for parameter in model.parameters():
            if not parameter.any() or not parameter.isfinite().all():
                torch.nn.init.normal_(parameter, std=0.02)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    partial.chmod(0o755)
    with quiet_transformers():
        model.save_pretrained(partial, save_original_format=False)
        processor(config).save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        # Another process was first: its folder has the same content.
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise
    return folder


def processor(config):
    """SAM 3's video processor (images, videos, text) for a `Sam3VideoConfig`'s image size.

    The tokenizer is CLIP's byte-pair encoding, whose vocabulary open_clip ships.
    """
    from transformers import Sam3ImageProcessor, Sam3VideoProcessor
    from transformers.models.sam2_video.video_processing_sam2_video import Sam2VideoVideoProcessor

    side = config.tracker_config.image_size
    size = {"height": side, "width": side}
    half = [0.5, 0.5, 0.5]
    return Sam3VideoProcessor(
        image_processor=Sam3ImageProcessor(size=size, image_mean=half, image_std=half),
        video_processor=Sam2VideoVideoProcessor(size=size, image_mean=half, image_std=half),
        tokenizer=clip_tokenizer(),
    )


def read_config(folder: Path):
    """Read the `Sam3VideoConfig` of a chassis folder.

    Raises:
        ChassisError: another model's config.
    """
    from transformers import Sam3VideoConfig

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind != "sam3_video":
        raise ChassisError(
            f"sam3.checkpoint: {folder} holds a model of type {kind!r}; expected 'sam3_video', the full SAM 3 with "
            "detector and tracker (facebook/sam3 is one)"
        )
    return Sam3VideoConfig.from_pretrained(folder)


def shard_of(folder: Path) -> dict[str, Path]:
    """Return which safetensors file holds each tensor of a folder: {tensor name: file}.

    Raises:
        ChassisError: no safetensors, or a file that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({path.name for path in shards.values() if not path.is_file()})
        if absent:
            raise ChassisError(f"sam3.checkpoint: {folder} lacks {', '.join(absent)}, which its index names")
        return shards
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ChassisError(f"sam3.checkpoint: {folder} has neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, "pt") as file:
        return {name: single for name in file.keys()}


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors whose names start with `prefix`, memory-mapped, with the prefix taken off.

    Raises:
        ChassisError: none has the prefix.
    """
    files: dict[Path, list[str]] = {}
    for name, path in shard_of(folder).items():
        if name.startswith(prefix):
            files.setdefault(path, []).append(name)
    if not files:
        raise ChassisError(
            f"sam3.checkpoint: no tensor of {folder} starts with {prefix!r}; expected the names of transformers' "
            "Sam3VideoModel"
        )
    tensors = {}
    for path, names in files.items():
        with safe_open(path, "pt") as file:
            for name in names:
                tensors[name.removeprefix(prefix)] = file.get_tensor(name)
    return tensors


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a folder's tensors, without reading them."""
    shapes = {}
    files = shard_of(folder)
    for path in set(files.values()):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def elements(folder: Path) -> int:
    """Number of elements of all tensors of a folder, without reading them."""
    return sum(torch.Size(shape).numel() for shape in shapes_of(folder).values())


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Return a 128-bit hash (hex) over names, types, shapes and bytes, independent of the order."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_part(model_class, config, tensors: dict[str, torch.Tensor]):
    """Build `model_class(config)` with exactly these weights, in eval mode and frozen.

    Raises:
        ChassisError: a tensor is missing, left over or of another shape; the message names the first ones.
    """
    model = model_class(config)
    wanted = model.state_dict()
    info = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
            for name, tensor in tensors.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    refuse_partial(info, f"the checkpoint's tensors do not fit {model_class.__name__} as its config.json says")
    # Not `from_pretrained`, which under ZeRO-3 divides a frozen model among the ranks; assigned, so that the tensors
    # keep their types and stay where they are mapped.
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def refuse_partial(info: dict, problem: str) -> None:
    """Raise unless transformers' loading info says that every tensor found its place.

    Raises:
        ChassisError: it does not; the message begins with `problem` and names the first tensors of each kind.
    """
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        listed = "; ".join(f"{kind}: {len(names)} ({', '.join(names[:3])})" for kind, names in wrong.items())
        raise ChassisError(f"{problem}: {listed}")
