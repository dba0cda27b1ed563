# SPDX-License-Identifier: Apache-2.0
"""`effsam3 report` of a whole run in a real browser, from the file and with nothing else.

The picture of docs/runs.md is made here, too, of the demo's run: `make pictures`.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from PIL import Image
from playwright.sync_api import Page

from effsam3.report import report

SHORT = ["train.steps=4", "train.eval_every=2", "train.save_every=4", "train.log_every=1", "optim.warmup_steps=1"]
DARK = (0x14, 0x17, 0x1C)  # the paper of the dark scheme
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def file(shared, tmp_path_factory) -> Path:
    """The page of a short run, or of the one that the variable names, alone in a folder."""
    out = tmp_path_factory.mktemp("sent") / "report.html"
    run = Path(os.environ.get("EFFSAM3_REPORT_RUN", tmp_path_factory.mktemp("run") / "runs/smoke-image"))
    home = run.parents[1]
    if not run.exists():
        for verb in ("train", "merge", "evaluate"):
            run_here(home, verb, *shared[1], *SHORT)
    os.chdir(home)  # the page names the run as whoever asked for it did
    report(str(run.relative_to(home)), str(out))
    return out


@pytest.fixture(params=["light", "dark"])
def page(request, browser, file):
    """The page in both colour schemes; at the end nothing has been asked of the network, or complained about."""
    page = browser.new_page(viewport=DESKTOP, color_scheme=request.param)
    asked, said = [], []
    page.on("request", lambda one: asked.append(one.url))
    page.on("console", lambda one: said.append(one.text))
    page.on("pageerror", lambda one: said.append(str(one)))
    page.goto(file.as_uri())
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()] and said == []
    page.close()


def seen(page: Page, selector: str = ".pair") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB")).astype(int)


def shown(page: Page) -> float:
    """How much of the left image of the first pair is shown, in percent."""
    return page.locator(".pair").first.evaluate("pair => parseFloat(pair.style.getPropertyValue('--at'))")


def test_everything_is_there_and_loads(page, file):
    assert file.stat().st_size < 2e6
    for title in ("State", "Curves", "Measured", "Pictures", "Model", "Recipe", "Environment"):
        assert page.locator(f"#{title.lower()} h2").inner_text() == title
    images = page.locator("img")
    assert images.count() >= 4
    assert all(width > 50 for width in images.evaluate_all("all => all.map(one => one.naturalWidth)"))
    assert page.locator(".missing").count() == 0
    assert "held-out images" in page.locator("#measured table").first.inner_text()
    page.locator("summary").click()
    assert "tiny_convnext" in page.locator("#recipe pre").inner_text()


def test_a_drag_and_the_keys_move_the_slider(page):
    pair, slider = page.locator(".pair").first, page.locator(".pair input").first
    pair.scroll_into_view_if_needed()
    box = pair.bounding_box()
    middle, at = box["y"] + box["height"] / 2, (box["x"] + box["width"] * share for share in (0.5, 0.9, -0.1, 1.1))
    page.mouse.move(next(at), middle)
    page.mouse.down()
    page.mouse.move(next(at), middle)
    assert abs(shown(page) - 90) < 3  # the line is where the pointer is
    page.mouse.move(next(at), middle)
    assert shown(page) == 0
    student = seen(page)
    page.mouse.move(next(at), middle)
    assert shown(page) == 100
    page.mouse.up()
    teacher = seen(page)
    inside = slice(10, -10)  # without the outline of what has the focus, and the line
    assert np.abs(teacher - student)[inside, inside].mean() > 1
    slider.press("ArrowLeft")
    assert shown(page) == 99
    slider.press("Home")
    assert shown(page) == 0
    np.testing.assert_array_equal(seen(page)[inside, inside], student[inside, inside])


def test_the_keyboard_reaches_every_slider_and_names_it(page):
    names = page.locator(".pair input").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert names and all("percent of teacher" in name for name in names)
    reached = set()
    for _ in range(page.locator("a, summary, pre, [tabindex], input").count() + 1):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert set(names) <= reached


def test_a_phone_needs_no_scrolling_sideways(page):
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for kind in (".pair", ".curves img"):
        assert page.locator(kind).first.bounding_box()["width"] > 300


def test_the_picture_of_the_documents(page):
    """The page down to its second picture; it is kept in the light scheme, where that was asked for."""
    last = page.locator(".picture").all()[:2][-1].bounding_box()
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture = picture.crop((0, 0, picture.width, round(last["y"] + last["height"]) + 20))
    paper = picture.getpixel((2, 2))
    assert paper == ((255, 255, 255) if page.evaluate("!matchMedia('(prefers-color-scheme: dark)').matches") else DARK)
    if (folder := os.environ.get("EFFSAM3_SCREENSHOTS")) and paper != DARK:
        picture.thumbnail((900, picture.height))
        picture.quantize(128).save(f"{folder}/report.png", optimize=True)
