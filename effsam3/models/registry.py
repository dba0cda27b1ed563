# SPDX-License-Identifier: Apache-2.0
"""What is known of every SAM 3 and every student before any weights exist. Plain data: no torch, no numpy.

A SAM 3 is a row of `SAM3S`; nothing else in the package knows its Hub id, sizes, counts, classes or licence.

Counts are exact numbers of parameters; docs/parameters.md explains where each comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from effsam3.errors import UserError, did_you_mean
from effsam3.models.chassis import tiny_concepts
from effsam3.models.chassis.tiny import full_config, tiny_config, vision_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FUSED_WIDTH = 256  # channels inside the fused head, and inside a vision student's
HEAD_BLOCKS = 2  # of the latter
FUSED_MAPS = 3  # they read at most this many of the coarsest maps: strides 8, 16 and 32


# ---- SAM 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a SAM 3's vision encoder, named as in its config.json."""

    image_size: int  # pixels, square
    patch_size: int
    hidden_size: int  # channels of the trunk's output
    intermediate_size: int
    num_hidden_layers: int
    pretrain_image_size: int  # the position table's
    fpn_hidden_size: int  # channels of the neck's output

    @classmethod
    def of(cls, vision: Mapping[str, Any]) -> Sizes:
        """Pick them out of a config.json's vision encoder: all but the neck's width are its backbone's."""
        found = {**vision["backbone_config"], "fpn_hidden_size": vision["fpn_hidden_size"]}
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    @property
    def grid(self) -> int:
        """Rows (and columns) of the trunk's output."""
        return self.image_size // self.patch_size

    @property
    def trunk_params(self) -> int:
        """Parameters of the ViT trunk in transformers."""
        # Counted from the sizes, so that a tiny or a local SAM 3 needs no count of its own.
        D, M = self.hidden_size, self.intermediate_size
        layer = 4 * (D * D + D) + (2 * D * M + M + D) + 4 * D  # attention, MLP, two LayerNorms
        positions = (self.pretrain_image_size // self.patch_size) ** 2
        return self.num_hidden_layers * layer + 3 * self.patch_size**2 * D + positions * D + 2 * D

    @property
    def neck_params(self) -> int:
        """Parameters of one of the two necks."""
        D, C = self.hidden_size, self.fpn_hidden_size
        halved, quartered = (4 * wide * (wide // 2) + wide // 2 for wide in (D, D // 2))  # 2x2, transposed
        entries = sum(wide * C + C for wide in (D // 4, D // 2, D, D))  # 1x1
        return 2 * halved + quartered + entries + 4 * (9 * C * C + C)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The parameters of a SAM 3, as in the file of its authors, with its tracker."""

    total: int
    vision: int  # trunk + two necks
    text: int  # encoder + projection
    trunk: int
    neck: int  # one of the two; both stay when a student moves in
    transformers_total: int  # of the same model in transformers, whose trunk is `Sizes.trunk_params`


@dataclass(frozen=True, kw_only=True)
class License:
    """The terms of the weights, which go along with every release."""

    name: str  # for the Hub
    title: str  # how its text begins
    url: str


@dataclass(frozen=True, kw_only=True)
class Sam3:
    """A SAM 3: all that must be known of it apart from its files."""

    label: str
    hub_id: str | None  # None: made up
    sizes: Sizes
    counts: Counts | None  # None: not counted
    gflop: Mapping[str, float] = field(default_factory=dict)  # of every part in models/flops.py; {}: not counted
    config: Callable[[], PreTrainedConfig]  # of the whole model with these sizes
    config_type: str  # `model_type` of its config.json ...
    model_class: str  # ... and transformers' class for it
    trunk_type: str  # `model_type` of its own trunk and text encoder, by which students are told from them
    text_type: str
    key_map: str  # models/keymaps/<key_map>.py: its authors' names for its tensors
    context_length: int  # tokens of a prompt, to which transformers' processors pad
    memory_frames: int  # frames that its tracker remembers of an object ...
    memory_pointers: int  # ... and object pointers
    license: License
    # Of a made-up one: what draws weights anew where transformers' own will not do.
    initialise: Callable[[Any], None] = lambda model: None


@dataclass(frozen=True, kw_only=True)
class ForeignSam3:
    """A SAM 3 of which transformers has only a part: `import` takes that part, and the rest from another SAM 3."""

    label: str
    released: str
    hub_id: str
    file: str  # of its authors, on the Hub
    lacks: str  # what transformers does not have of it
    hub_name: str  # pattern of its names on the Hub
    tensor_names: str  # pattern of tensors that no other SAM 3 has, by its authors' and by transformers' names
    key_map: str  # models/keymaps/<key_map>.py: its names in those of SAM 3


SAM3 = Sam3(
    label="SAM 3",
    hub_id="facebook/sam3",
    sizes=Sizes(
        image_size=1008,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4736,
        num_hidden_layers=32,
        pretrain_image_size=336,
        fpn_hidden_size=256,
    ),
    counts=Counts(
        total=860_055_224,
        vision=461_841_920,
        text=353_724_672,
        trunk=446_237_696,  # with the position of a class token, which nothing reads and transformers leaves out
        neck=7_802_112,
        transformers_total=859_921_848,
    ),
    gflop={
        "trunk": 5398.57,
        "detector_neck": 212.68,
        "tracker_neck": 214.71,
        "text_encoder": 19.45,
        "detector": 424.33,
        "mask_decoder": 4.59,
        "memory_attention": 951.29,
        "memory_encoder": 14.69,
    },
    config=full_config,
    config_type="sam3_video",
    model_class="Sam3VideoModel",
    trunk_type="sam3_vit_model",
    text_type="clip_text_model",
    key_map="sam3",
    context_length=32,
    memory_frames=7,
    memory_pointers=16,
    license=License(
        name="sam-license",
        title="SAM License",
        url="https://github.com/facebookresearch/sam3/blob/main/LICENSE",
    ),
)
TINY = replace(
    SAM3,
    label="the tiny SAM 3",
    hub_id=None,
    sizes=Sizes.of(vision_config()),
    counts=None,
    gflop={},
    config=tiny_config,
)
TINY_CONCEPTS = replace(
    TINY,
    label="the tiny SAM 3 for concepts",
    sizes=Sizes.of(vision_config(tiny_concepts.SHAPE)),
    config=partial(tiny_config, tiny_concepts.SHAPE),
    initialise=tiny_concepts.initialise,
)

# What `sam3.checkpoint` names without a file: a Hub id, or a chassis with random weights.
SAM3S = {SAM3.hub_id: SAM3, "random": replace(SAM3, hub_id=None), "tiny": TINY, "tiny_concepts": TINY_CONCEPTS}

FOREIGN = {
    "sam3.1": ForeignSam3(
        label="SAM 3.1",
        released="27 March 2026",
        hub_id="facebook/sam3.1",
        file="sam3.1_multiplex.pt",
        lacks="video tracker (object multiplex)",
        hub_name=r"(?i)(^|/)sam-?3[._-]?1\b|sam3p1",
        # Its neck has three towers, its tracker two decoders.
        tensor_names=r"(^|\.)(interactive_convs|propagation_convs)\."
        r"|(^|\.)tracker(_model)?\.(model\.|interactive_sam_)",
        key_map="sam31",
    ),
}


def is_made_up(checkpoint: str) -> bool:
    """Whether a recipe's `sam3.checkpoint` has random weights, made from a fixed seed, under nobody's licence."""
    return checkpoint in SAM3S and SAM3S[checkpoint].hub_id is None


def named(checkpoint: str) -> Sam3:
    """Return the SAM 3 that a recipe's `sam3.checkpoint` names; of a file or folder, SAM 3 itself must be supposed."""
    return SAM3S.get(checkpoint, SAM3)


def of_type(config_type: str) -> Sam3:
    """Return the SAM 3 whose config.json has this `model_type`.

    Raises:
        LookupError: no SAM 3 has it; the message says which there are.
    """
    # Reversed, so that of rows of one type the published one, which is the first, counts.
    rows = {row.config_type: row for row in reversed(SAM3S.values())}
    if config_type not in rows:
        raise LookupError(f"a model of type {config_type!r}; expected {' or '.join(map(repr, rows))}")
    return rows[config_type]


# ---- students


@dataclass(frozen=True, kw_only=True)
class ImageStudent:
    """A timm trunk (`features_only`, without classifier) that takes the place of SAM 3's ViT."""

    label: str  # EfficientSAM3's name for it
    timm_name: str
    family: str
    published_millions: float | None  # as the EfficientSAM3 documents print it; None: not one of theirs
    trunk_params: int
    trunk_gflop: float | None = None  # on an image of 1008 px, branches not folded; None: not counted
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
    encoder_params: int  # only the tower, with its 77-token position table
    hidden_size: int  # its MLPs are four times as wide
    num_hidden_layers: int
    num_attention_heads: int
    use_repmixer_blocks: bool  # the first and the last layer are convolutions with BatchNorm
    weights: str | None  # where MobileCLIP's own are, as models/text/weights.py reads it
    source: str  # paper and licence of the weights

    @property
    def total_params(self) -> int:
        """With the projector to SAM 3's 256 channels."""
        return self.params(77, 256)

    def params(self, context_length: int, channels: int) -> int:
        """Parameters of the student with `context_length` positions and a projector to `channels`."""
        table = self.encoder_params + (context_length - 77) * self.hidden_size
        return table + (self.hidden_size + 1) * channels


_REPVIT: dict[str, Any] = {"family": "RepViT", "source": "Wang et al., CVPR 2024, arXiv:2307.09283; Apache-2.0"}
_TINYVIT: dict[str, Any] = {"family": "TinyViT", "source": "Wu et al., ECCV 2022, arXiv:2207.10666; Apache-2.0"}
_EFFICIENTVIT: dict[str, Any] = {
    "family": "EfficientViT",
    "source": "Cai et al., ICCV 2023, arXiv:2205.14756; Apache-2.0",
}
_CONVNEXT: dict[str, Any] = {"family": "ConvNeXt", "source": "timm's test model; Apache-2.0"}
_SEPARABLE: dict[str, Any] = {"family": "separable", "source": "made up", "strides": (16,), "out_indices": (3,)}

IMAGE_STUDENTS = {
    name: ImageStudent(
        label=label,
        timm_name=timm_name,
        published_millions=millions,
        trunk_params=exact,
        trunk_gflop=gflop,
        channels=channels,
        **family,
    )
    for name, label, timm_name, millions, exact, gflop, channels, family in (
        ("repvit_m0_9", "ES-RV-S", "repvit_m0_9", 4.72, 4_717_792, 33.18, (48, 96, 192, 384), _REPVIT),
        ("repvit_m1_1", "ES-RV-M", "repvit_m1_1", 7.77, 7_774_864, 54.39, (64, 128, 256, 512), _REPVIT),
        ("repvit_m2_3", "ES-RV-L", "repvit_m2_3", 22.40, 22_404_232, 183.35, (80, 160, 320, 640), _REPVIT),
        ("tiny_vit_5m", "ES-TV-S", "tiny_vit_5m_224", 5.07, 5_071_124, 53.19, (64, 128, 160, 320), _TINYVIT),
        ("tiny_vit_11m", "ES-TV-M", "tiny_vit_11m_224", 10.55, 10_547_076, 86.69, (64, 128, 256, 448), _TINYVIT),
        ("tiny_vit_21m", "ES-TV-L", "tiny_vit_21m_224", 20.62, 20_620_416, 182.03, (96, 192, 384, 576), _TINYVIT),
        ("efficientvit_b0", "ES-EV-S", "efficientvit_b0", 0.68, 682_608, 3.73, (16, 32, 64, 128), _EFFICIENTVIT),
        ("efficientvit_b1", "ES-EV-M", "efficientvit_b1", 4.64, 4_643_936, 20.32, (32, 64, 128, 256), _EFFICIENTVIT),
        ("efficientvit_b2", "ES-EV-L", "efficientvit_b2", 14.98, 14_977_008, 62.89, (48, 96, 192, 384), _EFFICIENTVIT),
        # For tests and the smoke recipe: no BatchNorm, so its trajectory does not depend on the micro-batch.
        ("tiny_convnext", "tiny", "test_convnext", None, 207_000, None, (24, 32, 48, 64), _CONVNEXT),
        # For `tiny_concepts` with the head `linear`: 1.4 and 10.6 % of its trunk.
        ("tiny_separable_w4", "tiny W4", "tiny_separable_w4", None, 1_848, None, (16,), _SEPARABLE),
        ("tiny_separable_w16", "tiny W16", "tiny_separable_w16", None, 18_528, None, (64,), _SEPARABLE),
    )
}
# apple-amlr is Apple's licence for research purposes only.
_MOBILECLIP = "Vasu et al., CVPR 2024, arXiv:2311.17049; weights apple-amlr"
_MOBILECLIP2 = "Faghri et al., TMLR 2025, arXiv:2508.20691; weights apple-amlr"


def _text_students(*rows: tuple) -> dict[str, TextStudent]:
    """Return the text students by name; sizes are width, layers, heads and whether there are RepMixer blocks."""
    return {
        name: TextStudent(
            label=label,
            tower=tower,
            published_millions=millions,
            encoder_params=exact,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            use_repmixer_blocks=repmixer,
            weights=weights,
            source=source,
        )
        for name, label, tower, millions, exact, (width, layers, heads, repmixer), weights, source in rows
    }


# Where MobileCLIP's own weights are, as models/text/weights.py reads it.
_S0, _S1, _L = "apple/MobileCLIP-S0/mobileclip_s0.pt", "MobileCLIP-S1", "MobileCLIP2-L-14"
TEXT_STUDENTS = _text_students(
    ("mobileclip_s0", "ES-MC-S", "MobileCLIP-S0", 42.57, 42_441_216, (512, 6, 8, True), _S0, _MOBILECLIP),
    ("mobileclip_s1", "ES-MC-M", "MobileCLIP-S1", 63.56, 63_428_096, (512, 12, 8, False), _S1, _MOBILECLIP),
    ("mobileclip2_l", "ES-MC-L", "MobileCLIP2-L", 123.6, 123_650_304, (768, 12, 12, False), _L, _MOBILECLIP2),
)
# For tests and the smoke recipe. The second has no BatchNorm, so its trajectory does not depend on the micro-batch.
_REPMIXER, _PLAIN = "RepMixer, transformer layer, RepMixer", "two transformer layers"
TINY_TEXT_STUDENTS = _text_students(
    ("tiny_text", "tiny", _REPMIXER, None, 1_616_064, (32, 3, 2, True), None, "made up"),
    ("tiny_text_plain", "tiny", _PLAIN, None, 1_610_016, (32, 2, 2, False), None, "made up"),
)


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
    """Count the parameters of a head on maps with `channels` (finest first) that outputs `width` channels."""
    W, D = FUSED_WIDTH, width
    if head == "linear":
        return (channels[-1] + 1) * width
    if head == "stride32":
        return channels[-1] * D + 2 * D + 9 * D * D + D  # 1x1, BatchNorm, 3x3
    assert head == "fused", head
    fused = channels[-FUSED_MAPS:]
    # A trunk with fewer maps has fewer laterals and one block less, see `FusedHead`.
    laterals = (sum(fused) + len(fused)) * W
    block = 2 * W + 9 * W * W + W  # LayerNorm, 3x3
    output = 2 * W + W * D + D  # LayerNorm, 1x1
    return laterals + max(1, len(fused) - 1) * block + output


def vision_params(channels: tuple[int, ...], widths: tuple[int, ...], neck: int) -> tuple[int, int]:
    """Count the parameters of a vision student's head on maps with `channels` (finest first), and of both necks.

    `widths` are those of its recipe; `neck` is the number of channels that the necks put out.
    """
    W, (own, fine, middle, top) = FUSED_WIDTH, widths
    used, units = channels[-FUSED_MAPS:], 2 * fine
    block = W * (7 * 7 + 1) + (W + 1) * 2 * W + (2 * W + 1) * W
    head = (sum(used) + len(used)) * W + 2 * W + HEAD_BLOCKS * block + (W + 1) * own  # and LayerNorm
    inner = (own + 1) * (9 * top + 16 * middle + 4 * units) + (units + 1) * 16 * fine + top + middle + units + fine
    return head, 2 * (inner + sum((width + 1) * neck for width in (fine, middle, top)))
