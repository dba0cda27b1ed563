# SPDX-License-Identifier: Apache-2.0
"""Published numbers of other models, to stand next to measured ones: each with its data and its source.

Nothing here was measured by this project. Other data, prompts and machines make other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """One model on one data set.

    Attributes:
        board: the benchmark as `effsam3.leaderboard` names it.
        scores: by the names of the board's columns: shares of 1, IL_MCC in -1..1.
        millions: parameters of the whole model, where they are published.
    """

    model: str
    board: str
    data: str
    scores: dict[str, float] = field(hash=False)
    source: str
    millions: float | None = None


_SAM3 = "github.com/facebookresearch/sam3, scripts/eval/gold/README.md"
_EFFICIENT = "github.com/SimonZeng7108/efficientsam3"
_GOLD = "SA-Co Gold, mean of 7 subsets"
_COCO = "COCO val2017, box of each object"


def _concepts(model: str, cgf1: float, mcc: float, pmf1: float, source: str) -> Published:
    return Published(model, "concepts", _GOLD, {"cgF1": cgf1 / 100, "IL_MCC": mcc, "pmF1": pmf1 / 100}, source)


def _tracker(model: str, sav_test: float, source: str, millions: float | None = None) -> Published:
    return Published(model, "vos", "SA-V test", {"J&F": sav_test / 100}, source, millions)


_BOXES = {
    **{"EV-S": 62.92, "EV-M": 66.02, "EV-L": 67.28},
    **{"RV-S": 66.04, "RV-M": 66.44, "RV-L": 67.17},
    **{"TV-S": 66.87, "TV-M": 67.65, "TV-L": 68.72},
}
_STUDENT_TEXT = f"{_EFFICIENT}, BENCHMARK_README.md of 50d0179^"
_SAM2 = "github.com/facebookresearch/sam2, README.md"

PUBLISHED = (
    _concepts("SAM 3", 54.06, 0.82, 66.11, _SAM3),
    *(
        Published(name, "concepts", _GOLD, {"cgF1": cgf1 / 100}, _SAM3)
        for name, cgf1 in (("DINO-X", 21.26), ("OWLv2", 17.27), ("Gemini 2.5", 13.03), ("gDino-T", 3.25))
    ),
    _concepts("EfficientSAM3, SAM 3's ViT and text S0", 54.40, 0.82, 66.31, _STUDENT_TEXT),
    _concepts("EfficientSAM3, SAM 3's ViT and text S1", 54.25, 0.82, 66.25, _STUDENT_TEXT),
    _concepts("EfficientSAM3, SAM 3's ViT and text L", 54.21, 0.82, 66.17, _STUDENT_TEXT),
    Published(
        "EfficientSAM3, image and text students, stage 3",
        "concepts",
        "5 % of SA-Co Gold, mean of 7 subsets",
        {"cgF1": 0.0458},
        f"{_EFFICIENT}, stage3/stage3_plan.md",
    ),
    *(
        Published(f"EfficientSAM3 ES-{name}", "masks", _COCO, {"box": miou / 100}, _STUDENT_TEXT)
        for name, miou in _BOXES.items()
    ),
    _tracker("SAM 2.1 T", 76.5, _SAM2, 38.9),
    _tracker("SAM 2.1 S", 76.6, _SAM2, 46.0),
    _tracker("SAM 2.1 B+", 78.2, _SAM2, 80.8),
    _tracker("SAM 2.1 L", 79.5, _SAM2, 224.4),
    _tracker("EdgeTAM", 71.7, "github.com/facebookresearch/EdgeTAM, README.md; parameters: arXiv 2501.07256", 13.9),
)
