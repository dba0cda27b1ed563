# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md tells the truth: paths exist, and the ten things are where its table says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ANSWERS = re.findall(r"^\| [^|]+\? \| `([^`]+)` \| `(\w+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), ANSWERS)
def test_things_are_where_the_page_says(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def test_ten_questions_are_answered():
    assert len(ANSWERS) == 10


PAGES = [ROOT / "docs" / page for page in ("architecture.md", "extending.md", "troubleshooting.md")]
PATHS = {
    path
    for page in PAGES
    for path in re.findall(r"`((?:effsam3|tests|scripts)/[\w./]+\w/?)`", page.read_text("utf-8"))
}


@pytest.mark.parametrize("path", sorted(PATHS))
def test_paths_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    broken = []
    for file, heading in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text("utf-8")):
        target = page.parent / file if file else page
        if not target.exists() or heading and heading not in anchors(target):
            broken.append(f"{file}#{heading}")
    assert broken == []


def anchors(page):
    """Return the names that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_room_is_drawn():
    rooms = {folder.name for folder in (ROOT / "effsam3").iterdir() if (folder / "__init__.py").is_file()}
    drawing = PAGE.split("```")[1]
    assert {room for room in rooms if f"{room}/" not in drawing} == set()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in index} == set()
