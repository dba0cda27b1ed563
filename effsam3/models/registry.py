# SPDX-License-Identifier: Apache-2.0
"""What is known about the teacher and every student before any weights exist. Plain data: no torch, no numpy.

Counts are exact numbers of parameters; docs/parameters.md says where each comes from.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from effsam3.checked_files import mismatch, parse_json, read_text
from effsam3.errors import UserError, did_you_mean
from effsam3.models.chassis import tiny
from effsam3.models.chassis.sam31 import refuse_sam31, refuse_sam31_id

FUSED_WIDTH = 256  # channels inside the fused head
FUSED_MAPS = 3  # it reads so many of the coarsest maps, or as many as there are: strides 8, 16 and 32


@dataclass(frozen=True, kw_only=True)
class ImageStudent:
    """A timm trunk (`features_only`, without classifier) that takes the place of SAM 3's ViT."""

    label: str  # EfficientSAM3's name for it
    timm_name: str
    family: str
    published_millions: float | None  # as the EfficientSAM3 documents print it; None: not one of theirs
    trunk_params: int
    channels: tuple[int, ...]  # of its feature maps, finest first
    strides: tuple[int, ...] = (4, 8, 16, 32)  # pixels from one position of a map to the next
    out_indices: tuple[int, ...] = (0, 1, 2, 3)  # what timm calls these maps
    source: str  # paper and licence of the weights


@dataclass(frozen=True, kw_only=True)
class TextStudent:
    """A text tower that takes the place of SAM 3's text encoder."""

    label: str
    tower: str
    published_millions: float | None  # as the EfficientSAM3 documents print it; None: not one of theirs
    encoder_params: int  # the tower alone, with its 77-token position table
    total_params: int  # with the projector to SAM 3's 256 channels
    hidden_size: int  # its MLPs are four times as wide
    num_hidden_layers: int
    num_attention_heads: int
    use_repmixer_blocks: bool  # the first and the last layer are convolutions with BatchNorm
    weights: str | None  # where MobileCLIP's own are, as models/text_weights.py reads it
    source: str  # paper and licence of the weights

    def params(self, context_length: int, channels: int) -> int:
        """Parameters of the student with `context_length` positions and a projector to `channels`."""
        table = self.encoder_params + (context_length - 77) * self.hidden_size
        return table + (self.hidden_size + 1) * channels


@dataclass(frozen=True, kw_only=True)
class TeacherCounts:
    """SAM 3's parameters, as in the original `sam3.pt` with its tracker."""

    total: int = 860_055_224
    vision: int = 461_841_920  # trunk + two necks
    text: int = 353_724_672
    trunk: int = 446_237_696
    neck: int = 7_802_112  # one of the two; both stay when a student moves in
    transformers_total: int = 859_921_848
    transformers_trunk: int = 446_236_672  # without the position of the class token, which nothing reads


@dataclass(frozen=True, kw_only=True)
class ChassisFacts:
    """The sizes of a SAM 3's vision encoder, named as in its config.json."""

    image_size: int  # pixels, square
    patch_size: int
    hidden_size: int  # channels of the trunk's output
    intermediate_size: int
    num_hidden_layers: int
    pretrain_image_size: int  # the position table's
    fpn_hidden_size: int  # channels of the neck's output

    @property
    def grid(self) -> int:
        """Rows (and columns) of the trunk's output."""
        return self.image_size // self.patch_size

    @property
    def trunk_params(self) -> int:
        """Parameters of the ViT trunk in transformers."""
        D, M = self.hidden_size, self.intermediate_size
        layer = 4 * (D * D + D) + (2 * D * M + M + D) + 4 * D  # attention, MLP, two LayerNorms
        positions = (self.pretrain_image_size // self.patch_size) ** 2
        return self.num_hidden_layers * layer + 3 * self.patch_size**2 * D + positions * D + 2 * D


TEACHER = TeacherCounts()
SAM3 = ChassisFacts(
    image_size=1008,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4736,
    num_hidden_layers=32,
    pretrain_image_size=336,
    fpn_hidden_size=256,
)

_REPVIT = {"family": "RepViT", "source": "Wang et al., CVPR 2024, arXiv:2307.09283; Apache-2.0"}
_TINYVIT = {"family": "TinyViT", "source": "Wu et al., ECCV 2022, arXiv:2207.10666; Apache-2.0"}
_EFFICIENTVIT = {"family": "EfficientViT", "source": "Cai et al., ICCV 2023, arXiv:2205.14756; Apache-2.0"}

IMAGE_STUDENTS = {
    "repvit_m0_9": ImageStudent(
        label="ES-RV-S",
        timm_name="repvit_m0_9",
        published_millions=4.72,
        trunk_params=4_717_792,
        channels=(48, 96, 192, 384),
        **_REPVIT,
    ),
    "repvit_m1_1": ImageStudent(
        label="ES-RV-M",
        timm_name="repvit_m1_1",
        published_millions=7.77,
        trunk_params=7_774_864,
        channels=(64, 128, 256, 512),
        **_REPVIT,
    ),
    "repvit_m2_3": ImageStudent(
        label="ES-RV-L",
        timm_name="repvit_m2_3",
        published_millions=22.40,
        trunk_params=22_404_232,
        channels=(80, 160, 320, 640),
        **_REPVIT,
    ),
    "tiny_vit_5m": ImageStudent(
        label="ES-TV-S",
        timm_name="tiny_vit_5m_224",
        published_millions=5.07,
        trunk_params=5_071_124,
        channels=(64, 128, 160, 320),
        **_TINYVIT,
    ),
    "tiny_vit_11m": ImageStudent(
        label="ES-TV-M",
        timm_name="tiny_vit_11m_224",
        published_millions=10.55,
        trunk_params=10_547_076,
        channels=(64, 128, 256, 448),
        **_TINYVIT,
    ),
    "tiny_vit_21m": ImageStudent(
        label="ES-TV-L",
        timm_name="tiny_vit_21m_224",
        published_millions=20.62,
        trunk_params=20_620_416,
        channels=(96, 192, 384, 576),
        **_TINYVIT,
    ),
    "efficientvit_b0": ImageStudent(
        label="ES-EV-S",
        timm_name="efficientvit_b0",
        published_millions=0.68,
        trunk_params=682_608,
        channels=(16, 32, 64, 128),
        **_EFFICIENTVIT,
    ),
    "efficientvit_b1": ImageStudent(
        label="ES-EV-M",
        timm_name="efficientvit_b1",
        published_millions=4.64,
        trunk_params=4_643_936,
        channels=(32, 64, 128, 256),
        **_EFFICIENTVIT,
    ),
    "efficientvit_b2": ImageStudent(
        label="ES-EV-L",
        timm_name="efficientvit_b2",
        published_millions=14.98,
        trunk_params=14_977_008,
        channels=(48, 96, 192, 384),
        **_EFFICIENTVIT,
    ),
    # For tests and the smoke recipe: no BatchNorm, so its trajectory does not depend on the micro-batch.
    "tiny_convnext": ImageStudent(
        label="tiny",
        timm_name="test_convnext",
        published_millions=None,
        trunk_params=207_000,
        channels=(24, 32, 48, 64),
        family="ConvNeXt",
        source="timm's test model; Apache-2.0",
    ),
}

# apple-amlr is Apple's licence for research purposes only.
_MOBILECLIP = {"source": "Vasu et al., CVPR 2024, arXiv:2311.17049; weights apple-amlr"}
_MOBILECLIP2 = {"source": "Faghri et al., TMLR 2025, arXiv:2508.20691; weights apple-amlr"}

TEXT_STUDENTS = {
    "mobileclip_s0": TextStudent(
        label="ES-MC-S",
        tower="MobileCLIP-S0",
        published_millions=42.57,
        encoder_params=42_441_216,
        total_params=42_572_544,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        use_repmixer_blocks=True,
        weights="apple/MobileCLIP-S0/mobileclip_s0.pt",
        **_MOBILECLIP,
    ),
    "mobileclip_s1": TextStudent(
        label="ES-MC-M",
        tower="MobileCLIP-S1",
        published_millions=63.56,
        encoder_params=63_428_096,
        total_params=63_559_424,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        use_repmixer_blocks=False,
        weights="MobileCLIP-S1",
        **_MOBILECLIP,
    ),
    "mobileclip2_l": TextStudent(
        label="ES-MC-L",
        tower="MobileCLIP2-L",
        published_millions=123.6,
        encoder_params=123_650_304,
        total_params=123_847_168,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        use_repmixer_blocks=False,
        weights="MobileCLIP2-L-14",
        **_MOBILECLIP2,
    ),
}

# For tests and the smoke recipe. The second has no BatchNorm, so its trajectory does not depend on the micro-batch.
_TINY = {"label": "tiny", "published_millions": None, "weights": None, "source": "made up"}
TINY_TEXT_STUDENTS = {
    "tiny_text": TextStudent(
        tower="RepMixer, transformer layer, RepMixer",
        encoder_params=1_616_064,
        total_params=1_624_512,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_repmixer_blocks=True,
        **_TINY,
    ),
    "tiny_text_plain": TextStudent(
        tower="two transformer layers",
        encoder_params=1_610_016,
        total_params=1_618_464,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_repmixer_blocks=False,
        **_TINY,
    ),
}


def text_student_row(name: str) -> TextStudent:
    """Return the text student's row, published or tiny.

    Raises:
        UserError: no student has that name.
    """
    rows = TEXT_STUDENTS | TINY_TEXT_STUDENTS
    if name not in rows:
        raise UserError(f"no text student is called {name!r}{did_you_mean(name, rows)}")
    return rows[name]


def head_params(head: str, channels: tuple[int, ...], width: int) -> int:
    """Count the parameters of a head on maps with `channels` (finest first) that puts out `width` channels."""
    W, D = FUSED_WIDTH, width
    if head == "stride32":
        return channels[-1] * D + 2 * D + 9 * D * D + D  # 1x1, BatchNorm, 3x3
    assert head == "fused", head
    fused = channels[-FUSED_MAPS:]
    laterals = (sum(fused) + len(fused)) * W
    block = 2 * W + 9 * W * W + W  # LayerNorm, 3x3
    output = 2 * W + W * D + D  # LayerNorm, 1x1
    return laterals + max(1, len(fused) - 1) * block + output


def chassis_facts(checkpoint: str) -> ChassisFacts:
    """Return the sizes of the SAM 3 that a recipe's `sam3.checkpoint` names; a local one's are in its config.

    Raises:
        UserError: a Hub id whose sizes are not known without a download, or a folder or file that holds no SAM 3.
    """
    if checkpoint in ("facebook/sam3", "random"):
        return SAM3
    if not Path(checkpoint).exists():
        refuse_sam31_id(checkpoint)
    if checkpoint == "tiny":
        return _facts(tiny.vision_config())
    path = Path(checkpoint)
    sources = (path / "config.json", path / "merged" / "config.json", path)
    source = next((file for file in sources if file.is_file()), None)
    if source is None:
        raise UserError(
            f"sam3.checkpoint: the sizes of {checkpoint!r} are not known, there is no {sources[0]}; "
            "give a local transformers folder, a sam3.pt, facebook/sam3, random or tiny"
        )
    try:
        texts = _texts_in(source) if source == path else ["effsam3", read_text(source, GIVE)]
    except NOT_LISTED as error:
        raise UserError(
            f"sam3.checkpoint: {source} is not of a SAM 3 with its own ViT ({type(error).__name__}: {error}); {GIVE}"
        ) from error
    refuse_sam31(texts, f"sam3.checkpoint: {source}")
    if "effsam3" not in texts[:-1]:  # where a sam3.pt of this project says its config; others have the published sizes
        return SAM3
    said = texts[texts.index("effsam3") + 1]
    config = parse_json(said, dict, f"sam3.checkpoint: {source}", GIVE)
    config = config if source != path else config.get("config")
    if wrong := mismatch(config, {"detector_config": {"vision_config": VISION_FORM}}):
        raise UserError(f"sam3.checkpoint: {source} is not of a SAM 3 with its own ViT: {wrong}; {GIVE}")
    return _facts(config["detector_config"]["vision_config"])


def _texts_in(file: Path) -> list[str]:
    """All texts in a sam3.pt: names of tensors and entries, and what a file of this project says of itself.

    Its pickle is only listed, so this takes neither torch nor trust.
    """
    with ZipFile(file) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        listing = pickletools.genops(archive.read(f"{folder}/data.pkl"))
        return [argument for _, argument, _ in listing if isinstance(argument, str)]


GIVE = "give a folder that transformers' Sam3VideoModel.save_pretrained wrote, or a sam3.pt"
VISION_FORM = {
    "fpn_hidden_size": int,
    "backbone_config": {field.name: int for field in fields(ChassisFacts) if field.name != "fpn_hidden_size"},
}
# What listing a file that is no sam3.pt may raise.
NOT_LISTED = (BadZipFile, EOFError, LookupError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)


def _facts(vision: dict) -> ChassisFacts:
    """Pick the facts out of a vision config: all but the neck's width are its backbone's."""
    backbone = {**vision["backbone_config"], "fpn_hidden_size": vision["fpn_hidden_size"]}
    found = ChassisFacts(**{field.name: backbone[field.name] for field in fields(ChassisFacts)})
    if wrong := [name for name, size in vars(found).items() if not 0 < size < 2**17]:
        raise UserError(f"sam3.checkpoint: {wrong[0]} is {backbone[wrong[0]]}, which is the size of no SAM 3; {GIVE}")
    return found
