# SPDX-License-Identifier: Apache-2.0
"""The image student: a timm trunk and a head that brings it to the teacher's grid and width.

It is a transformers model, so that a SAM 3 config can name it as the vision backbone and `from_pretrained` rebuilds
it.

Letters: B images, C channels, H W rows and columns of a feature map, N = H * W positions, D the teacher's channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from effsam3.errors import UserError
from effsam3.hub import hub_errors
from effsam3.models.chassis.pickled import PickledError, open_pickled
from effsam3.models.image.backbones import build, build_trunk, feature_maps, image_student, trunk_tensors
from effsam3.models.registry import FUSED_MAPS, FUSED_WIDTH, SAM3
from effsam3.tensor_files import TensorFileError, read_safetensors, refuse_unusable


class StudentError(UserError):
    """A student that cannot be built as asked: no such weights, or weights of something else."""


def resize_BCHW(feat_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map bilinearly to (H, W), antialiased when it shrinks; returns the map itself when the size fits."""
    if tuple(feat_BCHW.shape[-2:]) == tuple(size):
        return feat_BCHW
    if size[0] >= feat_BCHW.shape[-2]:
        return F.interpolate(feat_BCHW, size, mode="bilinear", align_corners=False)
    if torch.onnx.is_in_onnx_export():
        # Not all runtimes antialias, nor say that they do not (OpenVINO 2026); a resize is linear in rows and columns.
        return _resizing_of(size[0], feat_BCHW.shape[-2]) @ feat_BCHW @ _resizing_of(size[1], feat_BCHW.shape[-1]).T
    # In float32: torch's antialiased kernel knows no bfloat16 on the CPU.
    resized = F.interpolate(feat_BCHW.float(), size, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(feat_BCHW.dtype)


def _resizing_of(to: int, side: int) -> Tensor:
    """Return the matrix (to, side) that an antialiased resize multiplies columns with."""
    one = torch.eye(side)[None, None]
    return F.interpolate(one, (to, side), mode="bilinear", align_corners=False, antialias=True)[0, 0]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). It needs no batch, so the head learns alike at any micro-batch."""

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        return super().forward(feat_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stride32Head(nn.Sequential):
    """The published head: 1x1, BatchNorm, GELU, 3x3 on the stride-32 map, then bilinear to the grid.

    Its parameters are named and shaped as in EfficientSAM3's checkpoints (`head.0`, `head.1`, `head.3`).
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__(
            nn.Conv2d(channels[-1], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    @property
    def last(self) -> nn.Conv2d:
        """The layer that outputs the features."""
        last = self[3]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(  # type: ignore[override]  # not a tensor comes in, but all maps of a trunk
        self, maps: list[Tensor], grid: tuple[int, int]
    ) -> Tensor:
        return resize_BCHW(super().forward(maps[-1]), grid)


class FusionBlock(nn.Module):
    """Residual 3x3 convolution after a LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        return feat_BCHW + F.gelu(self.conv(self.norm(feat_BCHW)))


class FusedHead(nn.Module):
    """Top-down fusion of strides 32, 16 and 8 straight onto the teacher's grid, in `FUSED_WIDTH` channels.

    The grid (stride 14) lies between strides 16 and 8: the stride-8 map brings the detail that a stride-32 map has
    lost. Of a trunk with fewer such maps, a plain ViT's single one, it takes those that there are.
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, FUSED_WIDTH, 1) for c in channels[-FUSED_MAPS:])
        self.fuse16 = FusionBlock(FUSED_WIDTH) if len(self.lateral) == FUSED_MAPS else None
        self.fuse_grid = FusionBlock(FUSED_WIDTH)
        self.norm = LayerNorm2d(FUSED_WIDTH)
        self.project = nn.Conv2d(FUSED_WIDTH, width, 1)

    @property
    def last(self) -> nn.Conv2d:
        """The layer that outputs the features."""
        return self.project

    def forward(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        used = maps[-len(self.lateral) :]
        # Resizing follows the 1x1: they commute, and it is cheaper on whichever map is smaller.
        *finer, fused = (lateral(feat) for lateral, feat in zip(self.lateral, used, strict=True))
        if self.fuse16 is not None:
            # Top-down: coarse maps know what is there, fine ones where; the sum gives both to every position.
            middle = finer.pop()
            fused = self.fuse16(middle + resize_BCHW(fused, middle.shape[-2:]))
        fused = resize_BCHW(fused, grid)
        if finer:
            fused = fused + resize_BCHW(finer.pop(), grid)
        return self.project(self.norm(self.fuse_grid(fused)))


class LinearHead(nn.Module):
    """1x1 on the coarsest map, then bilinear to the grid: for students that are smaller than any other head."""

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        self.project = nn.Conv2d(channels[-1], width, 1)

    @property
    def last(self) -> nn.Conv2d:
        """The layer that outputs the features."""
        return self.project

    def forward(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        return resize_BCHW(self.project(maps[-1]), grid)


HEADS = {"fused": FusedHead, "stride32": Stride32Head, "linear": LinearHead}


class StudentTrunkConfig(PreTrainedConfig):
    """What a student trunk is: enough to rebuild it without its weights.

    `hidden_size`, `patch_size` and `image_size` are what SAM 3's neck reads of any backbone: its own sizes.
    `student_image_size` is what the student sees (None: the same); it resizes pixels by itself. `out_indices` are the
    feature maps by timm's numbers.
    """

    model_type = "effsam3_student_trunk"

    timm_name: str = "repvit_m1_1"
    out_indices: list[int] | tuple[int, ...] = (0, 1, 2, 3)
    head: str = "fused"
    student_image_size: int | None = None
    hidden_size: int = SAM3.sizes.hidden_size
    patch_size: int = SAM3.sizes.patch_size
    image_size: int = SAM3.sizes.image_size

    @property
    def seen_size(self) -> int:
        """Side in pixels of the images that the trunk itself is given."""
        return self.student_image_size or self.image_size


def student_config(student: str, head: str, seen: int | None, **sam3) -> StudentTrunkConfig:
    """Return the config of a student by its name in recipes.

    Args:
        seen: its `student_image_size`.
        sam3: the sizes of the SAM 3 that it is for: `hidden_size`, `image_size` and `patch_size`.

    Raises:
        UserError: there is no such student, or it cannot be one at this size.
    """
    row = image_student(student, seen or sam3["image_size"])
    architecture = row.timm_name.partition(".")[0]
    return StudentTrunkConfig(
        timm_name=architecture, out_indices=row.out_indices, head=head, student_image_size=seen, **sam3
    )


class StudentBackbone(PreTrainedModel):
    """A timm trunk and a head that makes one map of its maps: what a SAM 3 config names as the vision backbone."""

    config_class = StudentTrunkConfig
    main_input_name = "pixel_values"
    base_model_prefix = "student"

    def __init__(self, config: StudentTrunkConfig):
        super().__init__(config)
        trunk: Any = build_trunk(config.timm_name, config.seen_size, tuple(config.out_indices))
        self.trunk = trunk
        self.head = self.make_head(tuple(trunk.feature_info.channels()), tuple(trunk.feature_info.reduction()))

    def make_head(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Module:
        """Build what turns the trunk's maps, finest first, and a grid (H, W) into `hidden_size` channels on the grid.

        `channels` and `strides` (pixels from one position to the next) are the maps'.
        """
        raise NotImplementedError

    def _init_weights(self, module: Any) -> None:
        """Compute the buffers of a timm module that no file holds, such as the indices of TinyViT's attention biases.

        `from_pretrained` builds on `meta`, gives such buffers memory without contents and then calls this. Weights
        stay as timm and torch have initialised them, better than transformers' default would.
        """
        if module._non_persistent_buffers_set:
            module.init_non_persistent_buffers()

    def train(self, mode: bool = True) -> StudentBackbone:
        """Set the mode, and forget what the trunk has computed from older weights.

        In eval mode some of timm's trunks (TinyViT, LeViT) keep their attention biases, whatever is loaded or averaged
        into the parameters later; `train(True)` is what makes every version of timm drop them.
        """
        super().train(True)
        return super().train(mode)

    def get_input_embeddings(self) -> None:  # type: ignore[override]  # pixels have none
        """None: there are no token embeddings. transformers asks every backbone."""

    def feature_map(self, pixels_B3SS: Tensor) -> Tensor:
        """Return what the head makes of pixels in -1..1, (B, D, G, G); G = S / patch_size."""
        grid = tuple(side // self.config.patch_size for side in pixels_B3SS.shape[-2:])
        if self.config.student_image_size is not None:
            # Inside the model, so that processors, grid and heads never learn of the smaller size.
            pixels_B3SS = resize_BCHW(pixels_B3SS, (self.config.student_image_size,) * 2)
        if torch.is_autocast_enabled("cuda"):
            # All maps of the trunk follow. In half precision a GPU trains such trunks 1.3 to 1.8 times faster in this
            # layout (LOG.md, 2026-11-29); CPUs are slower in it.
            pixels_B3SS = pixels_B3SS.contiguous(memory_format=torch.channels_last)
        return self.head(feature_maps(self.trunk, pixels_B3SS), grid)


class StudentTrunk(StudentBackbone):
    """A student in the place of SAM 3's ViT: normalised pixels (B, 3, S, S) to features (B, N, D), row-major.

    `feature_scale` and `feature_mean` are the teacher's per-channel deviation and mean, set once before training: the
    network then works in standardised units whatever the size of the teacher's channels, and still outputs raw ones.
    """

    def __init__(self, config: StudentTrunkConfig):
        super().__init__(config)
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        # Buffers, so that they are saved, moved and merged with the weights, but never trained.
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_scale", torch.ones(config.hidden_size))
        self.post_init()

    def make_head(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Module:
        return HEADS[self.config.head](channels, self.config.hidden_size)

    def set_feature_statistics(self, mean_D: Tensor, deviation_D: Tensor) -> None:
        """Set the teacher's per-channel mean and deviation (float, D each)."""
        self.feature_mean.copy_(mean_D)
        self.feature_scale.copy_(deviation_D)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer whose output `feature_scale` and `feature_mean` turn into features."""
        head: Any = self.head
        return head.last

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        """Return `last_hidden_state` (B, N, D) for pixels in -1..1; N = (S / patch_size) squared."""
        # float(): under bf16 autocast the teacher's large channels would lose the small differences that matter.
        feat_BND = self.feature_map(pixel_values).flatten(2).transpose(1, 2).float()
        return BaseModelOutput(last_hidden_state=feat_BND * self.feature_scale + self.feature_mean)


def load_timm_weights(student: StudentBackbone, weights: str, timm_name: str | None = None) -> None:
    """Initialise the student's trunk from a timm classifier: `imagenet` (timm's default tag) or a local file.

    Every tensor of the trunk must be there; the classifier's own head is what is left over. `timm_name` is the trunk's
    with the tag of other weights than the default ones.

    Raises:
        StudentError: timm has no such weights, cannot fetch them, or they do not cover the trunk.
    """
    name = timm_name or student.config.timm_name
    overlay = {}
    if weights != "imagenet":
        # timm checks neither that the file is complete nor that its numbers are finite.
        read_weights_file(Path(weights), f"name weights of timm's {name}, or set student_init=imagenet or random")
        overlay = {"pretrained_cfg_overlay": {"file": weights}}
    what = f"student_init: {weights} weights of {name} cannot be loaded"
    remedy = "reach the Hub once so that they are cached, give a local weights file, or set student_init=random"
    with hub_errors(what, remedy, StudentError):
        source = build(name, student.config.seen_size, pretrained=True, **overlay).state_dict()
    wanted = student.trunk.state_dict()
    found = trunk_tensors(wanted, source)
    wrong = [key for key, value in found.items() if value is None or value.shape != wanted[key].shape]
    if wrong:
        raise StudentError(
            f"student_init: {len(wrong)} of {len(wanted)} tensors of {name} are not in {weights} or have another "
            f"shape (first: {wrong[0]}); give weights of timm's {name}, or set student_init=random"
        )
    student.trunk.load_state_dict(found)


def read_weights_file(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read the tensors that a student starts from (.safetensors, or a file of `torch.save`), and check them.

    Raises:
        StudentError: it is not there, damaged, or its tensors cannot be weights.
    """
    try:
        tensors = read_safetensors(path, remedy) if path.suffix == ".safetensors" else open_pickled(path).tensors
        refuse_unusable(tensors, str(path), remedy)
    except (TensorFileError, PickledError) as error:
        raise StudentError(f"student_init: {error}") from error
    return tensors


# On import, so that `from_pretrained` of a release finds the class that its config names.
AutoConfig.register(StudentTrunkConfig.model_type, StudentTrunkConfig)
AutoModel.register(StudentTrunkConfig, StudentTrunk)
