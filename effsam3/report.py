# SPDX-License-Identifier: Apache-2.0
"""The verb `report`: one HTML file of a run, to look at and to send, that needs no other file and no network.

effsam3 report runs/stage1-image-es_rv_m                        runs/stage1-image-es_rv_m/report.html
effsam3 report runs/stage1-image-es_rv_m --out report.html
"""

from __future__ import annotations

import io
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from effsam3 import __version__
from effsam3.benchmarks.pictures.drawing import read_comparisons
from effsam3.checked_files import read_json, read_text
from effsam3.errors import UserError
from effsam3.files import refuse_unwritable, write_text
from effsam3.models.chassis.card import CARD
from effsam3.publish import card
from effsam3.publish.release import Release, read_release
from effsam3.training.curves import default_metrics, draw, read_curves
from effsam3.training.progress import named_folder
from effsam3.training.state import described, examine

PAGE = Path(__file__).with_name("report.html")
PICTURES = 12  # how many are shown; the others are next to the page
WIDEST = 1280  # pixels of a picture, which a benchmark may have drawn wider
JPEG_QUALITY = 85
THEMES = {"light": "default", "dark": "dark_background"}  # of a page: matplotlib's style
CURVE_INCHES, CURVE_DPI, CURVE_COLOURS = (6.4, 3.8), 144, 256
# Without images, which a page that needs no network could not show; raw HTML is shown, not used.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


@dataclass(frozen=True)
class Section:
    """A part of the page: what it shows as `content` of the template's block `kind`, and what it lacks.

    Attributes:
        missing: a sentence, and the command that changes it; empty where nothing is missing.
    """

    title: str
    kind: str
    content: Any = ()
    missing: tuple[str, str] = ("", "")


def report(run: str, out: str | None = None) -> str:
    """Write the page of a run, whatever there is of it yet; return where it is and how big.

    Args:
        run: folder of a run or a release, or its recipe.
        out: the page; None: report.html in the folder.

    Raises:
        UserError: there is no such run, `out` is no HTML file or cannot be written, or a file of the run is damaged.
    """
    folder = named_folder(run)
    path = Path(out) if out else folder / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--out {path}: the name of a page ends in .html")
    refuse_unwritable(path.parent, "--out")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no run: it has no recipe.yaml; name a folder that `effsam3 train` has made")
    facts = examine(folder)
    release = read_release(folder) if (folder / "merged" / CARD).is_file() else None
    sections = [
        _state(facts),
        _curves(folder, facts),
        _tables(folder, release),
        _pictures(folder, release),
        _model(folder, release),
        Section("Recipe", "text", read_text(folder / "recipe.yaml", "restore it")),
        _environment(folder),
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        name=facts["name"],
        what=", ".join(filter(None, [facts["stage"], facts["student"]])),
        running=facts["state"] == "running",
        made=f"effsam3 {__version__}, {time.strftime('%Y-%m-%d %H:%M %Z')}",
        sections=sections,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    lacking = [f"missing: {section.missing[0]}" for section in sections if section.missing[0]]
    return "\n".join([f"{path}: {path.stat().st_size / 1e3:,.0f} kB", *lacking])


# ---- sections


def _state(facts: dict[str, Any]) -> Section:
    return Section("State", "rows", described(facts))


def _curves(folder: Path, facts: dict[str, Any]) -> Section:
    if facts["stage"] == "release":
        return Section("Curves", "curves", missing=("a release trains nothing: its parts' runs have curves", ""))
    try:
        found = read_curves(folder)
    except UserError as error:  # there are none yet
        return Section("Curves", "curves", missing=(str(error), ""))
    drawn = []
    for metric in default_metrics([folder], list(found)):
        step, value = found[metric][-1]
        by_theme = {theme: _curve(metric, found[metric], style) for theme, style in THEMES.items()}
        drawn.append({"about": f"{metric} over steps, {value:.4g} at step {step:,}", **by_theme})
    return Section("Curves", "curves", drawn)


def _curve(metric: str, points: list[tuple[int, float]], style: str) -> str:
    """Draw one curve as `effsam3 plot` does; returns it as an address of itself."""
    import matplotlib.style

    with matplotlib.style.context(style):
        figure = draw({metric: {metric: points}}, [metric], None, legend=False)  # there is one run only
        figure.set_size_inches(CURVE_INCHES)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=CURVE_DPI, transparent=True)
    small = io.BytesIO()
    # The one method that keeps transparency.
    Image.open(content).quantize(CURVE_COLOURS, Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return _address(small.getvalue(), "image/png")


def _tables(folder: Path, release: Release | None) -> Section:
    again = f"effsam3 evaluate {folder}"
    if release is None:
        return Section("Measured", "html", missing=("nothing is measured before the student is merged", again))
    if release.summary is not None:
        files = ", ".join(f"`eval/{path.name}`" for path in release.measured)
        return Section("Measured", "html", _html(f"{card.measured_tables(release.summary)}\n\nAll digits: {files}."))
    if release.measured:
        files = ", ".join(path.name for path in release.measured)
        return Section("Measured", "html", missing=(f"evaluate has not come to its end, so far it has {files}", again))
    other = ": what is in eval is of another merged model" if release.stale else ""
    return Section("Measured", "html", missing=(f"the merged model has not been measured{other}", again))


def _pictures(folder: Path, release: Release | None) -> Section:
    measured = () if release is None else release.pictures
    newest = sorted((folder / "pictures" / "validation").glob("*.png"))[-1:]
    paths = [*measured, *newest]
    if not paths:
        return Section("Pictures", "pictures", missing=("none has been drawn", f"effsam3 evaluate {folder}"))
    left = len(paths) - PICTURES
    missing = (f"{left} more pictures are in {folder}/pictures", "") if left > 0 else ("", "")
    return Section("Pictures", "pictures", [_picture(path) for path in paths[:PICTURES]], missing)


def _picture(path: Path) -> dict[str, Any]:
    """Return a picture and what it compares, as two images each to be laid over one another."""
    try:
        with Image.open(path) as opened:
            comparisons, picture = read_comparisons(opened, path), opened.convert("RGB")
    except OSError as error:  # of PIL, too
        raise UserError(f"{path} cannot be read ({error}); draw it again, or delete it") from error
    pairs = []
    for one in comparisons:
        sides = [(title, _jpeg(picture.crop(box))) for title, box in one.sides.items()]
        left, top, right, bottom = next(iter(one.sides.values()))
        pairs.append({"title": one.title, "sides": sides, "width": right - left, "height": bottom - top})
    return {"name": path.stem, "address": _jpeg(picture), "pairs": pairs}


def _jpeg(picture: Image.Image) -> str:
    picture.thumbnail((WIDEST, picture.height))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return _address(content.getvalue(), "image/jpeg")


def _address(content: bytes, kind: str) -> str:
    """Return an address that holds what it leads to."""
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _model(folder: Path, release: Release | None) -> Section:
    if release is None:
        return Section("Model", "html", missing=("nothing has been merged into SAM 3 yet", f"effsam3 merge {folder}"))
    about = card.slots, card.parameter_table, card.operations, card.limitations, card.licence
    parts = [part(release) for part in about]
    return Section("Model", "html", _html("\n\n".join(parts)))


def _environment(folder: Path) -> Section:
    path = folder / "provenance.json"
    if not path.is_file():
        return Section("Environment", "rows", missing=("no provenance.json is there: `train` writes it", ""))
    return Section("Environment", "rows", dict(_flat(read_json(path, {str: object}, "delete it"))))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the entries of nested mappings, keys with dots between them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "-" if value is None else str(value)


def _html(markdown: str) -> Markup:
    return Markup(MARKDOWN.render(markdown))  # which escapes what is not Markdown
