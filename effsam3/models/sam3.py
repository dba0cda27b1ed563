# SPDX-License-Identifier: Apache-2.0
"""The chassis: a SAM 3 checkpoint as a local folder in transformers' layout, read part by part.

Whatever a recipe's `sam3.checkpoint` names (a Hub id, a local folder, a sam3.pt, `tiny`, `random`) becomes a folder
first, so that everything after this file is one code path. Half-precision weights become float32 when they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash

from effsam3.checked_files import can_be_path, read_json
from effsam3.checkpoint import WEIGHTS
from effsam3.errors import ChassisError
from effsam3.models.cache import kept_in_cache
from effsam3.models.sam31 import refuse_sam31, refuse_sam31_id
from effsam3.models.tiny import MADE_UP
from effsam3.models.tokens import clip_tokenizer
from effsam3.tensor_files import open_safetensors, refuse_unusable, tensor_of

TRUNK = "detector_model.vision_encoder.backbone."  # the slot `image`
NECK = "detector_model.vision_encoder.neck."  # the detector's FPN; the tracker has its own, `tracker_neck.`
SAM3_TRUNK_PARAMETERS = 446_236_672  # of facebook/sam3's ViT in transformers
PICKLED = (".pt", ".pth")  # files that torch.save wrote
MADE_AS = "2"  # to be changed with what `_make` writes, so that no cache keeps the old
# Beside model.safetensors: what SAM 3's own layout has and transformers has no place for, under SAM 3's names.
EXTRAS_FILE = "sam3_original.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "fetch or merge it again"
ACCEPTED = (
    "expected a folder in transformers' layout, a run folder that has been merged, a sam3.pt (.pt or .pth), a Hub id "
    "such as facebook/sam3, `tiny` or `random`"
)
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


def chassis_folder(checkpoint: str, revision: str | None = None) -> Path:
    """Return a local folder with the checkpoint in transformers' layout.

    `tiny` and `random` are made once, from a fixed seed, under the cache folder; a `.pt` or `.pth` file in SAM 3's
    own layout is converted there once. A Hub id is downloaded. Of a run folder it is the merged model.

    Raises:
        ChassisError: no such folder or file, something else in it, or the Hub refuses it or is out of reach.
        PickledError: a file that is damaged, or holds no model.
    """
    if checkpoint in MADE_UP:
        return _make(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        return _model_folder(path)
    if path.suffix in PICKLED:
        from effsam3.models.original import converted

        return converted(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            with open_safetensors(path, AGAIN, ChassisError) as file:
                refuse_sam31(file.keys(), f"sam3.checkpoint: {path}")
        meant = f"name its folder, {path.parent}" if (path.parent / "config.json").is_file() else ACCEPTED
        raise ChassisError(f"sam3.checkpoint: {path} is a single file of another kind; {meant}")
    if path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1:
        raise ChassisError(f"sam3.checkpoint: there is no folder or file {checkpoint}; {ACCEPTED}")
    if path.parts[0] == "runs":  # a run folder's usual place, and no name of the Hub's
        raise ChassisError(
            f"sam3.checkpoint: there is no run folder {checkpoint} here yet; `effsam3 launch` the recipe whose name "
            f"is {path.name} first; {ACCEPTED}"
        )
    return _download(checkpoint, revision)


def _model_folder(folder: Path) -> Path:
    """Return the folder in transformers' layout that a local folder is or holds.

    Raises:
        ChassisError: it is something else; the message says what, if that is known.
    """
    for model in (folder, folder / "merged"):
        if (model / "config.json").is_file():
            return model
    files = sorted(path.name for path in folder.iterdir())
    if EXTRAS_FILE not in files:
        for name in (name for name in files if name.startswith("sam3") and name.endswith(".safetensors")):
            with open_safetensors(folder / name, AGAIN, ChassisError) as file:
                refuse_sam31(file.keys(), f"sam3.checkpoint: {folder / name}")
    if WEIGHTS in files:
        found = (
            "is a training checkpoint: a student without the rest. Name its run folder, once `effsam3 merge` has run"
        )
    elif "recipe.yaml" in files:
        found = "is a run folder without a merged model; run `effsam3 merge` on its recipe first"
    elif any(name.startswith("random_states_") for name in files):
        found = f"is accelerate's training state, which no model can be taken from; {ACCEPTED}"
    elif pickled := [name for name in files if Path(name).suffix in PICKLED]:
        found = f"has no config.json; if {folder / pickled[0]} is meant, name that file"
    else:
        found = f"has no config.json; {ACCEPTED}"
    raise ChassisError(f"sam3.checkpoint: {folder} {found}")


def _download(repo_id: str, revision: str | None) -> Path:
    refuse_sam31_id(repo_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=["*.safetensors", "*.json", "merges.txt", "LICENSE*"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ChassisError(
            f"sam3.checkpoint: {repo_id} is no folder here and cannot be had from the Hub ({type(error).__name__}: "
            f"{error}). facebook/sam3 is gated: ask for access on its page, then `hf auth login`; or name a local "
            "folder, or `tiny` for a trial"
        ) from error


def _make(name: str) -> Path:
    """Write the made-up chassis `name` under the cache folder, once; several processes may ask at the same time."""
    import transformers
    from transformers import Sam3VideoModel

    config = MADE_UP[name]()
    made_from = config.to_json_string() + transformers.__version__ + torch.__version__ + MADE_AS
    key = xxhash.xxh3_64_hexdigest(made_from.encode())

    def write(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Sam3VideoModel(config)
            # Zero or uninitialised parameters would make whatever they multiply invisible to every comparison.
            for parameter in model.parameters():
                if not parameter.any() or not parameter.isfinite().all():
                    torch.nn.init.normal_(parameter, std=0.02)
            # One tensor in SAM 3's own layout; transformers draws it twice.
            shared = model.tracker_model.shared_image_embedding.positional_embedding
            model.tracker_model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
        with quiet_transformers():
            model.save_pretrained(folder, save_original_format=False)
            processor(config).save_pretrained(folder)

    return kept_in_cache(f"{name}-{key}", write)


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
        ChassisError: it cannot be read, or is another model's.
    """
    from effsam3.models.chassis_config import config_from

    path = folder / "config.json"
    content = read_json(path, {"model_type": str}, AGAIN, ChassisError)
    if (kind := content["model_type"]) != "sam3_video":
        raise ChassisError(
            f"sam3.checkpoint: {folder} holds a model of type {kind!r}; expected 'sam3_video', the full SAM 3 with "
            "detector and tracker (facebook/sam3 is one)"
        )
    return config_from(content, str(path), AGAIN)


def shard_of(folder: Path) -> dict[str, Path]:
    """Return which safetensors file holds each tensor of a folder: {tensor name: file}.

    Raises:
        ChassisError: no safetensors, or two models of them; a file that the index names is not there, or does not
            hold what the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ChassisError(
            f"sam3.checkpoint: {folder} holds two models, {SINGLE} and the shards of {INDEX}; delete the one that is "
            "not meant"
        )
    if single.exists():
        with open_safetensors(single, AGAIN, ChassisError) as file:
            names = list(file.keys())
        refuse_sam31(names, f"sam3.checkpoint: {single}")
        return dict.fromkeys(names, single)
    if not index.exists():
        raise ChassisError(f"sam3.checkpoint: {folder} has neither {SINGLE} nor {INDEX}")
    listed = read_json(index, {"weight_map": {str: str}}, AGAIN, ChassisError)["weight_map"]
    refuse_sam31(listed, f"sam3.checkpoint: {folder}")
    if outside := [file for file in listed.values() if not can_be_path(file) or Path(file).name != file]:
        raise ChassisError(f"sam3.checkpoint: {index} names {outside[0][:80]!r}, no file of its folder; {AGAIN}")
    shards = {name: folder / file for name, file in listed.items()}
    absent = sorted({path.name for path in shards.values() if not path.exists()})
    if absent:
        raise ChassisError(f"sam3.checkpoint: {folder} lacks {', '.join(absent)}, which its index names")
    held = set()
    for path in set(shards.values()):
        with open_safetensors(path, AGAIN, ChassisError) as file:
            held |= {(name, path) for name in file.keys()}
    if differing := sorted(name for name, _ in held ^ set(shards.items())):
        raise ChassisError(
            f"sam3.checkpoint: {index} and the shards that it names do not agree about {len(set(differing))} tensors "
            f"(first: {differing[0]}); {AGAIN}"
        )
    return shards


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors whose names start with `prefix`, memory-mapped, with the prefix taken off.

    Numbers of another precision become float32: everything that learns, compares or merges sees one type.

    Raises:
        ChassisError: none has the prefix, or one cannot be a weight: it is not of real numbers, or not finite.
    """
    tensors = map_tensors(folder, prefix)
    refuse_unusable({prefix + name: tensor for name, tensor in tensors.items()}, str(folder), AGAIN, ChassisError)
    return {name: to_float32(tensor) for name, tensor in tensors.items()}


def map_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The same in the types of the files, and so without reading anything.

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
        with open_safetensors(path, AGAIN, ChassisError) as file:
            for name in names:
                tensors[name.removeprefix(prefix)] = tensor_of(file, name, path, AGAIN, ChassisError)
    return tensors


def refuse_damaged(folder: Path) -> None:
    """Refuse a folder with tensors that cannot be weights, before transformers reads it by itself.

    Raises:
        ChassisError: it cannot be read, or a tensor is not of real, finite numbers.
    """
    refuse_unusable(map_tensors(folder), str(folder), AGAIN, ChassisError)


def to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of real numbers as float32 and any other, or one that is float32 already, as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a folder's tensors, without reading them."""
    shapes = {}
    files = shard_of(folder)
    for path in set(files.values()):
        with open_safetensors(path, AGAIN, ChassisError) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def elements(folder: Path) -> int:
    """Number of elements of all tensors of a folder, without reading them."""
    return sum(torch.Size(shape).numel() for shape in shapes_of(folder).values())


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Return a 128-bit hash (hex) over names, types, shapes and bytes, independent of the order.

    Half-precision tensors count as the float32 that `read_tensors` makes of them. One tensor is in memory at a time.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = to_float32(tensors[name].detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_part(model_class, config, tensors: dict[str, torch.Tensor]):
    """Build `model_class(config)` with exactly these weights, in eval mode and frozen.

    Raises:
        ChassisError: a tensor is missing, left over or of another shape; the message names the first ones.
    """
    model = model_class(config)
    info = misfits(model.state_dict(), tensors)
    refuse_partial(info, f"the checkpoint's tensors do not fit {model_class.__name__} as its config.json says")
    # Not `from_pretrained`, which under ZeRO-3 divides a frozen model among the ranks; assigned, so that the tensors
    # keep their types and stay where they are mapped.
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def misfits(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Say in which tensors `found` differs from what a model wants: by kind, what `refuse_partial` takes."""
    both = {name: (tensor, wanted[name]) for name, tensor in found.items() if name in wanted}
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(tensor.shape)} for {tuple(own.shape)}"
            for name, (tensor, own) in both.items()
            if tensor.shape != own.shape
        ],
        "not floating point": [
            f"{name} {tensor.dtype}"
            for name, (tensor, own) in both.items()
            if own.is_floating_point() and not tensor.is_floating_point()
        ],
    }


def refuse_partial(info: dict, problem: str) -> None:
    """Raise unless transformers' loading info says that every tensor found its place.

    Raises:
        ChassisError: it does not; the message begins with `problem` and names the first tensors of each kind.
    """
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        listed = "; ".join(f"{kind}: {len(names)} ({', '.join(names[:3])})" for kind, names in wrong.items())
        raise ChassisError(f"{problem}: {listed}")
