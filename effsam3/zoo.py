# SPDX-License-Identifier: Apache-2.0
"""The verb `zoo`: a page of released models, a row for each, read from their folders.

effsam3 zoo runs/release-es_rv_m_mc_s                        the page on the console
effsam3 zoo runs/release-* --out docs/zoo.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effsam3.benchmarks.boards import BOARDS, rows_of
from effsam3.benchmarks.flops import part_gflop
from effsam3.files import refuse_unwritable, write_text
from effsam3.models.chassis.tensors import read_config
from effsam3.models.flops import USES
from effsam3.models.merging.slots import SLOTS
from effsam3.publish.card import OTHER_FORMATS, entries, parameters
from effsam3.publish.release import Release, read_release
from effsam3.recipe.reader import load_recipe
from effsam3.training.progress import named_folder
from effsam3.training.report import table

HEADER = ["model", *SLOTS, "parameters", *(f"GFLOP, {use}" for use in USES), "scores", "formats", "licence"]
PREFACE = """\
# Models

Written by `effsam3 zoo`, from the folders of released models; `make zoo RELEASES="runs/a runs/b"` writes it anew.
Slots name the student that has taken the place of a part of SAM 3, `-` where SAM 3's own is. GFLOP are billions of
operations of one use of the model, as on its card. Scores are what `evaluate` has found on the data named with them;
those of different data cannot be compared.
"""
NONE = """\
**Nothing has been released yet.** SAM 3's weights, which every model of this project starts from, were not at hand
where it was developed: there is no model to list, and no score to give. The [README](../README.md) says how to
train one, [publish.md](publish.md) how to release it, and [runs.md](runs.md#watching) how to compare several.
"""
LOAD = """\
## How to load one

```python
from effsam3 import Predictor

found = Predictor("NAME").image("photo.jpg", text="a dog")
```

`NAME` is what the column `model` says: a repository of the Hub, or a folder. [api.md](api.md) and
[transformers.md](transformers.md) say more, [devices.md](devices.md) how to do without PyTorch.
"""


def zoo(runs: Sequence[str], out: str | None = None) -> str:
    """Return the page of released models; with `out` also write it.

    Args:
        runs: folders of runs and releases with a merged model, or their recipes; none: the page says so.
        out: the page, a Markdown file.

    Raises:
        UserError: a folder has no merged model, or something in it is damaged.
    """
    if out is not None:
        refuse_unwritable(Path(out).parent, "--out")
    rows = [_row(read_release(named_folder(run))) for run in runs]
    listed = table(rows, HEADER, text_columns=len(HEADER)) + f"\n\n{LOAD}" if rows else NONE
    page = f"{PREFACE}\n{listed}"
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(out), page)
    return page


def _row(release: Release) -> list[str]:
    filled, config = entries(release), read_config(release.model)
    gflop = part_gflop(config)
    formats = ["transformers", *(name for name in OTHER_FORMATS if (release.model / name).is_file())]
    terms = "none of SAM 3's: random weights, a trial"
    if release.has_sam3:
        terms = f"[{release.sam3.license.title}]({release.sam3.license.url})"
        terms += ", and its students' (on its card)" if any(one.origin for one in filled.values()) else ""
    return [
        f"`{load_recipe(release.folder).push.repo or release.folder}`",
        *(filled[slot].called if slot in filled else "-" for slot in SLOTS),
        f"{parameters(config, SLOTS)['total'] / 1e6:.2f} M",
        *(f"{sum(gflop[part] for part in parts):,.2f}" for parts in USES.values()),
        _scores(release),
        ", ".join(formats),
        terms,
    ]


def _scores(release: Release) -> str:
    """Return what the students have scored on every board, with the data; "-" for what has not been measured."""
    texts = []
    for row in (row for row in rows_of(release) if row.role == "student"):
        columns = BOARDS[row.board].columns
        scores = ", ".join(f"{name} {columns[name](value)}" for name, value in row.scores.items())
        texts.append(f"{row.board}: {scores} ({row.data})")
    return "; ".join(texts) or "-"
