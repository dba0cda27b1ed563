# SPDX-License-Identifier: Apache-2.0
"""Image students by name: the registry's rows and, as timm/NAME, any backbone of timm.

torch and timm are imported when a timm/NAME is asked for and when a trunk is built, never for a row of the registry.

timm's registry is not asked: whoever registers a model under a name that timm has replaces timm's there. The entry
points are taken from timm's own modules, where they are written.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from effsam3.errors import UserError, did_you_mean
from effsam3.models.image import separable
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, ImageStudent

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "timm/"
FINEST, COARSEST = 8, 32  # strides of the maps that a head is given: a finer one would cost most and is dropped


def image_student(name: str, image_size: int = SAM3.sizes.image_size) -> ImageStudent:
    """Return what is known of a student that sees square images of `image_size` pixels.

    Raises:
        UserError: no student has that name; or the backbone cannot be one at this size, and why.
    """
    if name.startswith(PREFIX):
        return _measured(name, image_size)
    if name not in IMAGE_STUDENTS:
        raise UserError(
            f"no image student is called {name!r} (backbones of timm are called {PREFIX}NAME)"
            f"{did_you_mean(name, IMAGE_STUDENTS)}"
        )
    return IMAGE_STUDENTS[name]


def refuse_unknown_student(name: str) -> None:
    """Refuse a name that no student and no backbone of timm has; whether the backbone can be one is not looked at.

    Raises:
        UserError: naming what comes nearest.
    """
    if name.startswith(PREFIX):
        pretrained_cfg(name.removeprefix(PREFIX))
    else:
        image_student(name)


def student_name(timm_name: str) -> str:
    """Return how recipes call the student with this trunk: the registry's name, else timm/NAME."""
    named = (name for name, row in IMAGE_STUDENTS.items() if row.timm_name == timm_name)
    return next(named, PREFIX + timm_name)


# ---- timm's own modules


class Architecture(NamedTuple):
    """How a backbone is built, timm's `DefaultCfg` of its weights, and the module that it is from."""

    build: Callable[..., nn.Module]
    configs: Any
    family: str


@cache
def _architectures() -> dict[str, Architecture]:
    """Return all backbones by their names, timm's and the ones of ours that are made like them."""
    import timm.models  # noqa: F401  # imports them all

    found = {name: Architecture(*own, "separable") for name, own in separable.architectures().items()}
    for path, module in sorted(sys.modules.items()):
        if path.startswith("timm.models."):
            for name, configs in vars(module).get("default_cfgs", {}).items():
                if name in vars(module):
                    found[name] = Architecture(vars(module)[name], configs, path.rpartition(".")[2])
    return found


def pretrained_cfg(timm_name: str) -> Any:
    """Return timm's `PretrainedCfg` of ARCHITECTURE (its default weights) or ARCHITECTURE.TAG, as timm completes it.

    Raises:
        UserError: timm has no such architecture or weights; naming what comes nearest.
    """
    architecture, _, tag = timm_name.partition(".")
    if architecture not in _architectures():
        # Several, as timm's names differ in a digit or two.
        near = difflib.get_close_matches(architecture.lower(), _architectures(), n=3, cutoff=0.6)
        meant = (
            f"did you mean {' or '.join(PREFIX + name for name in near)}?" if near else "timm.list_models() has all"
        )
        raise UserError(f"timm has no backbone called {architecture!r}; {meant}")
    configs = _architectures()[architecture].configs
    if tag and tag not in configs.cfgs:
        raise UserError(
            f"timm has no weights {tag!r} of {architecture}{did_you_mean(tag, filter(None, configs.tags))}"
        )
    tag = tag or configs.tags[0]
    found = configs.cfgs[tag]
    if found.hf_hub_id == "timm/":  # timm's own repository for these weights
        found = replace(found, hf_hub_id=f"timm/{architecture}{'.' if tag else ''}{tag}")
    return replace(found, architecture=architecture, tag=tag or None)


def build(timm_name: str, image_size: int, **options) -> nn.Module:
    """Build a model of timm; `image_size` counts for those that are made for one size, such as plain ViTs.

    Args:
        options: what `timm.create_model` takes, such as `features_only`.

    Raises:
        UserError: timm has no such model.
    """
    config = pretrained_cfg(timm_name)
    if config.fixed_input_size:
        options["img_size"] = image_size
    return _architectures()[config.architecture].build(pretrained_cfg=config, **options)


def build_trunk(timm_name: str, image_size: int, out_indices: tuple[int, ...] | None = None) -> nn.Module:
    """Build a backbone that returns its feature maps at `out_indices`, by default those that timm thinks best."""
    options = {} if out_indices is None else {"out_indices": tuple(out_indices)}
    return build(timm_name, image_size, features_only=True, **options)


def feature_maps(trunk: nn.Module, pixels_B3SS: Tensor) -> list[Tensor]:
    """Run a trunk; return its maps (B, C, H, W), finest first."""
    maps = trunk(pixels_B3SS)
    # timm's trunks declare channels-last maps; MobileNets declare nothing and are channels-first.
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        return [feat_BHWC.permute(0, 3, 1, 2) for feat_BHWC in maps]
    return maps


def trunk_tensors(wanted: Mapping[str, Tensor], classifier: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return a trunk's tensors out of the same model's with its classifier; None for what is not there.

    Trunks flatten one level of names (`stages.0.` becomes `stages_0.`) or add one (`model.`, `body.`).
    """
    flat = {key.replace(".", "_", 1): value for key, value in classifier.items()}
    return {key: classifier.get(key, flat.get(key, classifier.get(key.partition(".")[2]))) for key in wanted}


# ---- a student that no row describes

# What timm's models raise on a size that they cannot take, or when they have no feature maps.
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@cache
def _measured(name: str, image_size: int) -> ImageStudent:
    """Build the backbone without memory for its weights, run it on an empty image, and look at its maps."""
    import torch

    timm_name = name.removeprefix(PREFIX)
    config = pretrained_cfg(timm_name)
    try:
        with torch.device("meta"):
            information: Any = build_trunk(timm_name, image_size).feature_info
            # Of maps of one stride the deepest: all of a plain ViT's have the same.
            deepest = dict(zip(information.reduction(), information.out_indices, strict=True))
            chosen = {stride: at for stride, at in deepest.items() if FINEST <= stride <= COARSEST}
            if not chosen:
                raise UserError(
                    f"student: the maps of {name} have strides {', '.join(map(str, deepest))}, a head needs one of "
                    f"{FINEST} to {COARSEST}; choose another backbone"
                )
            trunk = build_trunk(timm_name, image_size, tuple(chosen.values())).eval()
            maps = feature_maps(trunk, torch.zeros(1, 3, image_size, image_size))
            # Costs nothing on meta tensors, and shows which weights no map depends on.
            torch.stack([feat.sum() for feat in maps]).sum().backward()
        idle = [parameter for parameter, value in trunk.named_parameters() if value.grad is None]
        if idle:
            raise UserError(
                f"student: {len(idle)} tensors of {name} lead to none of the maps that a head reads (first: "
                f"{idle[0]}), and several processes would wait for their gradients; choose another backbone"
            )
        own = dict(trunk.named_parameters())
        shared = [parameter for parameter, _ in trunk.named_parameters(remove_duplicate=False) if parameter not in own]
        if shared:
            raise UserError(
                f"student: {len(shared)} tensors of {name} are shared by several of its modules (first: "
                f"{shared[0]}), and checkpoints keep each tensor once; choose another backbone"
            )
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(
            f"student: timm cannot make {name} a student for images of {image_size} px ({type(error).__name__}: "
            f"{error}); set another student_image_size, or choose another backbone"
        ) from error
    licence = config.license or "licence not stated"
    return ImageStudent(
        label=config.architecture,
        timm_name=timm_name,
        family=_architectures()[config.architecture].family,
        published_millions=None,
        trunk_params=sum(parameter.numel() for parameter in trunk.parameters()),
        channels=tuple(feat.shape[1] for feat in maps),
        strides=tuple(chosen),
        out_indices=tuple(chosen.values()),
        source=f"https://huggingface.co/{config.hf_hub_id}; {licence}" if config.hf_hub_id else f"timm; {licence}",
    )
