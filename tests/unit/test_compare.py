# SPDX-License-Identifier: Apache-2.0
"""The parameter tables, against the published numbers, timm's own modules, torch's layers and the documentation."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from effsam3.compare import compare, numbers
from effsam3.errors import UserError
from effsam3.models.image.backbones import image_student
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, head_params

OF_TIMM = [name for name, row in IMAGE_STUDENTS.items() if row.family != "separable"]
ROOT = Path(__file__).parents[2]

# label: published M, published % smaller than 461.84 M, exact trunk, stride-32 head, trunk + head, % less than the ViT
IMAGE = {
    "ES-EV-S": (0.68, 99.85, 682_608, 9_571_328, 10_253_936, 97.70),
    "ES-EV-M": (4.64, 99.00, 4_643_936, 9_702_400, 14_346_336, 96.79),
    "ES-EV-L": (14.98, 96.76, 14_977_008, 9_833_472, 24_810_480, 94.44),
    "ES-RV-S": (4.72, 98.98, 4_717_792, 9_833_472, 14_551_264, 96.74),
    "ES-RV-M": (7.77, 98.32, 7_774_864, 9_964_544, 17_739_408, 96.02),
    "ES-RV-L": (22.40, 95.15, 22_404_232, 10_095_616, 32_499_848, 92.72),
    "ES-TV-S": (5.07, 98.90, 5_071_124, 9_767_936, 14_839_060, 96.67),
    "ES-TV-M": (10.55, 97.72, 10_547_076, 9_899_008, 20_446_084, 95.42),
    "ES-TV-L": (20.62, 95.54, 20_620_416, 10_030_080, 30_650_496, 93.13),
}
TEXT = {"ES-MC-S": (42.57, 42_572_544), "ES-MC-M": (63.56, 63_559_424), "ES-MC-L": (123.6, 123_847_168)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_image_table_and_the_honest_one():
    rows = {row["label"]: row for row in numbers()["image"]}
    found = {
        label: (
            row["published_millions"],
            round(row["published_saved_percent"], 2),
            row["trunk"],
            row["stride32"]["head"],
            row["stride32"]["trunk_and_head"],
            round(row["stride32"]["saved_percent"], 2),
        )
        for label, row in rows.items()
    }
    assert found == IMAGE


def test_every_published_image_number_is_its_trunk_rounded():
    assert all(round(row["trunk"] / 1e6, 2) == row["published_millions"] for row in numbers()["image"])


def test_the_published_text_table():
    rows = numbers()["text"]
    assert {row["label"]: (row["published_millions"], row["encoder_and_projector"]) for row in rows} == TEXT
    assert [round(row["published_saved_percent"], 2) for row in rows] == [87.97, 82.03, 65.06]
    assert [round(row["saved_percent"], 2) for row in rows] == [87.96, 82.03, 64.99]
    assert rows[2]["encoder"] == 123_650_304
    # The projector is Linear(D -> 256).
    assert [row["encoder_and_projector"] - row["encoder"] for row in rows] == [513 * 256, 513 * 256, 769 * 256]


def test_the_teacher():
    assert round(SAM3.counts.total / 1e6, 2) == 860.06
    assert round(SAM3.counts.vision / 1e6, 2) == 461.84
    assert round(SAM3.counts.text / 1e6, 2) == 353.72
    assert SAM3.counts.trunk + 2 * SAM3.counts.neck == SAM3.counts.vision
    assert SAM3.counts.trunk - SAM3.sizes.trunk_params == 1024  # the position of the class token
    assert SAM3.counts.total - SAM3.counts.transformers_total == 132_352 + 1024


@pytest.mark.parametrize("name", OF_TIMM)
def test_trunks_are_what_timm_builds(name):
    row = image_student(name)
    with torch.device("meta"):
        trunk = timm.create_model(row.timm_name, features_only=True)
    assert count(trunk) == row.trunk_params
    assert tuple(trunk.feature_info.channels()) == row.channels
    assert trunk.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("name", OF_TIMM)
@pytest.mark.parametrize("width", [64, 1024])
def test_heads_are_the_sum_of_their_layers(name, width):
    channels = image_student(name).channels
    with torch.device("meta"):
        stride32 = [
            nn.Conv2d(channels[3], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3),
        ]
        fused = [nn.Conv2d(c, 256, 1) for c in channels[1:]]
        fused += [layer for _ in range(2) for layer in (nn.LayerNorm(256), nn.Conv2d(256, 256, 3))]
        fused += [nn.LayerNorm(256), nn.Conv2d(256, width, 1)]
    assert head_params("stride32", channels, width) == sum(map(count, stride32))
    assert head_params("fused", channels, width) == sum(map(count, fused))


def test_the_fused_head_is_lighter_than_the_published_one():
    assert all(row["fused"]["head"] < row["stride32"]["head"] / 5 for row in numbers()["image"])


def test_an_unknown_student():
    with pytest.raises(UserError, match=r"no image student is called 'repvit_m1' .+; did you mean repvit_m1_1\?"):
        image_student("repvit_m1")


def test_json_is_the_numbers_and_the_tables_show_them():
    assert json.loads(compare(as_json=True)) == numbers()
    text = compare()
    for row in numbers()["image"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['label']}"))
        values = line.replace("|", "").split()[2:]
        fused, stride32 = row["fused"], row["stride32"]
        assert values == [
            f"{row['published_millions']:.2f}",
            f"{row['published_saved_percent']:.2f}",
            f"{row['trunk']:,}",
            f"{fused['trunk_and_head'] / 1e6:.2f}",
            f"{fused['saved_percent']:.2f}",
            f"{fused['whole_model'] / 1e6:.2f}",
            f"{stride32['trunk_and_head'] / 1e6:.2f}",
            f"{stride32['saved_percent']:.2f}",
            f"{stride32['whole_model'] / 1e6:.2f}",
        ]
    assert "860.06 M = 461.84 M vision + 353.72 M text" in text


def test_the_documentation_has_the_same_numbers():
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1:] for line in page.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    for row in numbers()["image"]:
        heads = [f"{row[head]['trunk_and_head']:,}" for head in ("fused", "stride32")]
        assert rows[row["label"]] == [f"{row['published_millions']:.2f} M", f"{row['trunk']:,}", *heads]
    for row in numbers()["text"]:
        counts = [f"{row['encoder']:,}", f"{row['encoder_and_projector']:,}"]
        assert rows[row["label"]] == [row["tower"], f"{row['published_millions']:g} M", *counts]
    teacher = numbers()["teacher"]
    exact = {int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", page)}
    assert set(teacher.values()) - exact == set()
    for head in ("stride32", "fused"):
        millions = [row[head]["head"] / 1e6 for row in numbers()["image"]]
        assert f"{min(millions):.2f} to {max(millions):.2f} M" in page
