# SPDX-License-Identifier: Apache-2.0
"""`effsam3 demo` in a real browser: a click makes a mask, a text makes boxes, a video plays.

The pictures of docs/demo.md are made here, too, with models that have learned something:

    EFFSAM3_DEMO_STUDENT=RUN EFFSAM3_DEMO_TEACHER=RUN \
        EFFSAM3_DEMO_FOLDER=$PWD EFFSAM3_SCREENSHOTS=$PWD/docs/images python -m pytest tests/e2e/test_demo_page.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import ENVIRONMENT
from PIL import Image
from playwright.sync_api import Page, expect
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file

from effsam3.data.synthetic.videos import make_video
from effsam3.data.videos.mp4 import Mp4Writer
from effsam3.models.chassis.find import chassis_folder

PATIENCE_MS = 120_000  # on a busy machine
STAR = (128, 152)  # x, y of an object on the first frame


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Student and teacher: the tiny chassis made to believe that objects are visible, and as it is."""
    folder = shutil.copytree(chassis_folder("tiny"), tmp_path_factory.mktemp("model") / "student")
    tensors = load_file(folder / "model.safetensors")
    tensors["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"] += 5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return [os.environ.get("EFFSAM3_DEMO_STUDENT", str(folder)), os.environ.get("EFFSAM3_DEMO_TEACHER", "tiny")]


@pytest.fixture(scope="module")
def address(models):
    """The page, served by the verb as its users start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "effsam3", "demo", models[0], "--teacher", models[1], "--port", str(port)]
    folder = os.environ.get("EFFSAM3_DEMO_FOLDER")
    server = subprocess.Popen(
        line, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    for printed_line in server.stdout:
        printed.append(printed_line)
        if "open http" in printed_line:
            break
    assert "open http" in "".join(printed), "".join(printed)
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) in (0, 130, -signal.SIGINT)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """image.png, film.mp4 of 12 frames, and what cannot be used: torn.png, notes.txt, torn.mp4."""
    folder = tmp_path_factory.mktemp("media")
    frames = make_video(5, 24, 480, 3).frames[::2]
    Image.fromarray(frames[0]).save(folder / "image.png")
    film = Mp4Writer(folder / "film.mp4")
    for index, image in enumerate(frames):
        film.add(image, index / 24)
    film.close()
    (folder / "torn.png").write_bytes((folder / "image.png").read_bytes()[:5000])
    (folder / "torn.mp4").write_bytes((folder / "film.mp4").read_bytes()[:5000])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page.goto(address)
    yield page
    page.close()


def give(page: Page, kind: str, file: Path) -> None:
    """Put a file into the field of a tab."""
    if kind == "video":
        page.get_by_role("tab", name="Video").click()
    page.set_input_files(f"#{kind}-file input[type=file]", file)


def click(page: Page, kind: str, place: tuple[int, int]) -> None:
    """Click on a pixel of the picture, which is shown at another size."""
    canvas = page.locator(f"#{kind}-canvas img")
    canvas.wait_for()
    before, box = canvas.get_attribute("src"), canvas.bounding_box()
    width, height = canvas.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    # The picture keeps its proportions inside its frame, and is never made larger.
    scale = min(1, box["width"] / width, box["height"] / height)
    left, top = (box["width"] - scale * width) / 2, (box["height"] - scale * height) / 2
    canvas.click(position={"x": left + scale * place[0], "y": top + scale * place[1]})
    expect(canvas).not_to_have_attribute("src", before)  # the click is drawn


def set_score(page: Page, kind: str, score: str) -> None:
    field = page.locator(f"#{kind}-threshold input[type=number]")
    field.fill(score)
    field.press("Tab")


def downloaded(page: Page, kind: str, tmp_path: Path) -> Path:
    """Unpack what the button gives."""
    button = page.locator(f"#{kind}-download")
    expect(button).to_be_enabled()
    with page.expect_download() as download:
        button.click()
    download.value.save_as(tmp_path / "found.zip")
    zipfile.ZipFile(tmp_path / "found.zip").extractall(tmp_path / "found")
    return tmp_path / "found"


def predictions(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text())


def keep_picture(page: Page, name: str) -> None:
    """Save a picture of the page where the documents have it, if that was asked for."""
    page.wait_for_timeout(500)  # for what fades in
    picture = page.screenshot(full_page=True)
    assert len(picture) > 10_000
    if folder := os.environ.get("EFFSAM3_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}", full_page=True)
        Image.open(f"{folder}/{name}").quantize(128).save(f"{folder}/{name}", optimize=True)


# ---- images


def test_a_click_makes_a_mask_and_another_corrects_it(page, media, tmp_path):
    give(page, "image", media / "image.png")
    click(page, "image", STAR)
    summary = page.locator("#image-summary")
    expect(summary).to_contain_text("student: 1 instance in")
    expect(summary).to_contain_text("teacher: 1 instance in")  # next to it, with its own time
    for name in ("student", "teacher"):
        expect(page.locator(f"#image-{name} img")).to_be_visible()
    one = predictions(downloaded(page, "image", tmp_path / "one") / "student")
    (point,) = one["prompts"]["points"]
    np.testing.assert_allclose(point, (*STAR, 1), atol=2)  # pixels of the image, not of the page
    assert coco_mask.area(one["instances"][0]["segmentation"]) > 0
    page.get_by_label("next to it").click()
    click(page, "image", (20, 20))
    expect(page.locator("#image-download")).to_be_enabled()
    two = predictions(downloaded(page, "image", tmp_path / "two") / "student")
    assert [label for _, _, label in two["prompts"]["points"]] == [1, 0]
    keep_picture(page, "demo_image.png")


def test_two_corners_make_a_box_and_a_text_makes_boxes(page, media, tmp_path):
    give(page, "image", media / "image.png")
    page.get_by_label("a corner of a box").click()
    click(page, "image", (205, 220))
    click(page, "image", (60, 85))
    expect(page.locator("#image-summary")).to_contain_text("student: 1 instance in")
    (box,) = predictions(downloaded(page, "image", tmp_path / "box") / "student")["prompts"]["boxes"]
    np.testing.assert_allclose(box, (60, 85, 205, 220, 1), atol=2)

    page.get_by_role("button", name="Forget clicks and boxes").first.click()
    expect(page.locator("#image-summary")).to_be_empty()
    set_score(page, "image", "0.95")
    page.locator("#image-text textarea, #image-text input").fill("a star")
    page.locator("#image-find").click()
    expect(page.locator("#image-summary")).to_contain_text("student: 0 instances")
    expect(page.locator("#image-summary")).to_contain_text("the best score so far is 0.")
    set_score(page, "image", "0")
    page.locator("#image-find").click()
    expect(page.locator("#image-summary")).to_contain_text("student: 10 instances")
    expect(page.locator("#image-table")).to_contain_text("a star")
    found = predictions(downloaded(page, "image", tmp_path / "text") / "student")["instances"]
    assert len(found) == 10 and all(one["text"] == "a star" and len(one["box"]) == 4 for one in found)


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("image", "notes.txt", "'notes.txt': corrupt"),
        ("image", "torn.png", "'torn.png': "),
        ("video", "torn.mp4", "torn.mp4"),
    ],
)
def test_a_bad_file_is_named_and_the_next_one_works(page, media, kind, file, message):
    give(page, kind, media / file)
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(message)
    assert "/" not in toast.inner_text()  # no folders of the server's
    if kind == "image":
        page.locator(f"#{kind}-file").get_by_role("button").first.click()  # take it out
        give(page, kind, media / "image.png")
        page.locator("#image-canvas img").wait_for()


def test_a_text_before_any_file_is_told(page):
    page.locator("#image-find").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("there is no image yet")


# ---- videos


def plays(page: Page, name: str) -> tuple[float, int]:
    """How far a film has played, in seconds, and how wide it is."""
    film = page.locator(f"#video-{name} video")
    film.wait_for()
    film.evaluate("film => { film.muted = true; film.play(); }")
    page.wait_for_function(f"document.querySelector('#video-{name} video').currentTime > 0.1")
    assert film.evaluate("film => film.error") is None
    return film.evaluate("film => [film.duration, film.videoWidth]")


def test_what_is_clicked_in_a_video_is_tracked_and_plays(page, media, tmp_path):
    give(page, "video", media / "film.mp4")
    click(page, "video", STAR)
    page.locator("#video-track").click()
    expect(page.locator("#video-summary")).to_contain_text("teacher: ")
    expect(page.locator("#video-summary")).to_contain_text("student: 1 instance in 12 frames")
    for name in ("student", "teacher"):
        duration, width = plays(page, name)
        assert abs(duration - 0.5) < 0.1 and width == 480
    rows = predictions(downloaded(page, "video", tmp_path) / "student")["frames"]
    assert len(rows) == 12 and all(coco_mask.area(row["instances"][0]["segmentation"]) for row in rows[:3])
    keep_picture(page, "demo_video.png")


def test_a_text_is_tracked_from_another_frame_on(page, media, tmp_path):
    give(page, "video", media / "film.mp4")
    page.locator("#video-canvas img").wait_for()
    first = page.locator("#video-first input[type=number]")
    first.fill("8")
    first.press("Enter")
    page.locator("#video-most input").fill("2")
    set_score(page, "video", "0.2")
    page.locator("#video-text textarea, #video-text input").fill("a star")
    page.locator("#video-find").click()
    expect(page.locator("#video-summary")).to_contain_text("in 2 frames")
    found = predictions(downloaded(page, "video", tmp_path) / "student")
    assert found["first"] == 8 and len(found["frames"]) == 2
