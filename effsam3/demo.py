# SPDX-License-Identifier: Apache-2.0
"""The verb `demo`: a page on which a model is tried, on images and videos, next to its teacher.

Letters: H W rows and columns of an image.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported: nothing leaves this machine

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402

from effsam3.benchmarks.pictures.predictions import OVERLAY_WIDTH, draw, records, write_image  # noqa: E402
from effsam3.benchmarks.pictures.video_predictions import video_predictions  # noqa: E402
from effsam3.errors import UserError  # noqa: E402
from effsam3.inputs import read_image, read_video  # noqa: E402
from effsam3.models.inference.prompt_options import Asked, PredictError  # noqa: E402
from effsam3.predictor import IMAGE_THRESHOLD, Predictor, refuse_misfit  # noqa: E402

ON, OFF, CORNER = "on the object", "next to it", "a corner of a box"
FRAMES = 100  # tracked at most, unless somebody asks for more
UPLOADED = re.compile(r"[^\s']*/gradio/[0-9a-f]+/")  # the folder of a visitor's file, who knows its name
BUTTONS: list[Any] = ["fullscreen", "download"]  # on a picture
CSS = "#image-canvas img, #video-canvas img {cursor: crosshair} footer {display: none !important}"


def run(model: str, teacher: str | None, host: str, port: int, device: str | None = None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        PredictError: no such model, or a port that is taken.
        ChassisError: a model that is not whole.
    """
    predictors = {"model" if teacher is None else "student": Predictor(model, device=device)}
    if teacher is not None:
        predictors["teacher"] = Predictor(teacher, device=device)
    for name, predictor in predictors.items():
        print(f"loading the {name}, {predictor.folder}, on {predictor.device}", flush=True)
        # Both kinds of prompts at once: the first click should not wait for weights.
        _ = predictor.concepts, predictor.tracker
    with tempfile.TemporaryDirectory(prefix="effsam3-demo-") as folder:
        page = Page(predictors, Path(folder)).build(f"{model}" + (f" and its teacher {teacher}" if teacher else ""))
        theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # its own fonts are fetched from the net
        try:
            page.launch(server_name=host, server_port=port, theme=theme, css=CSS, quiet=True, prevent_thread_lock=True)
        except OSError as error:
            raise PredictError(f"--port {port}: {error}; name another") from error
        print(f"open http://{host}:{port} in a browser; Ctrl-C ends it", flush=True)
        page.block_thread()


def told(function: Callable) -> Callable:
    """Show what a user can change as a message on the page."""

    @functools.wraps(function)
    def asked(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:
            raise gr.Error(UPLOADED.sub("", str(error)), print_exception=False) from error

    return asked


class From:
    """A video that begins with its frame `first`."""

    def __init__(self, video: Any, first: int):
        self.video, self.first = video, first
        self.frames, self.size = video.frames - first, video.size

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        return self.video.read([self.first + index for index in indexes])

    def time_s(self, index: int) -> float:
        return self.video.time_s(self.first + index) - self.video.time_s(self.first)


class Page:
    """The page, and what its buttons do.

    What a visitor has shown is a dict: path of the file, points (x, y, label), boxes (x1, y1, x2, y2, 1), the first
    corner of another box, and a folder for what is found.
    """

    def __init__(self, predictors: dict[str, Predictor], folder: Path):
        self.predictors, self.folder = predictors, folder

    def build(self, title: str) -> gr.Blocks:
        """Lay the page out."""
        with gr.Blocks(title="effsam3", delete_cache=(3600, 3600)) as page:
            gr.Markdown(f"## effsam3\n`{title}`")
            if any(predictor.made_up for predictor in self.predictors.values()):
                gr.Markdown("*Some weights are random: what such a model finds means nothing.*")
            with gr.Tab("Image"):
                self._image_tab()
            with gr.Tab("Video"):
                self._video_tab()
        return page

    # ---- images

    def _image_tab(self) -> None:
        shown = gr.State({})
        with gr.Row():
            with gr.Column(scale=2):
                file = gr.File(label="An image", type="filepath", elem_id="image-file", height=120)
                canvas = gr.Image(
                    label="Click on it", interactive=False, elem_id="image-canvas", buttons=["fullscreen"], height=380
                )
                kind = gr.Radio([ON, OFF, CORNER], value=ON, label="A click is", elem_id="image-kind")
                clear = gr.Button("Forget clicks and boxes")
                text = gr.Textbox(label="Text (boxes are examples of it)", placeholder="a dog", elem_id="image-text")
                threshold = gr.Slider(0, 0.95, IMAGE_THRESHOLD, step=0.05, label="Score", elem_id="image-threshold")
                find = gr.Button("Find the text", variant="primary", elem_id="image-find")
            with gr.Column(scale=3):
                with gr.Row():
                    pictures = [
                        gr.Image(label=name, interactive=False, elem_id=f"image-{name}", height=380, buttons=BUTTONS)
                        for name in self.predictors
                    ]
                summary = gr.Markdown(elem_id="image-summary")
                table = gr.Dataframe(
                    headers=["model", "id", "text", "score", "box"],
                    interactive=False,
                    elem_id="image-table",
                    buttons=[],
                )
                download = gr.DownloadButton("Masks, boxes and pictures", interactive=False, elem_id="image-download")
        results = [shown, canvas, *pictures, summary, table, download]
        file.upload(self.open_image, [file], results, show_progress="minimal")
        canvas.select(self.click_image, [shown, kind], results, show_progress="minimal")
        clear.click(self.clear_image, [shown], results)
        gr.on([find.click, text.submit], self.find_in_image, [shown, text, threshold], results)

    @told
    def open_image(self, path: str) -> list:
        """Show an uploaded image."""
        read_image(path)  # so that it is refused here
        return self.clear_image({"path": path, "folder": tempfile.mkdtemp(dir=self.folder)})

    def clear_image(self, shown: dict) -> list:
        """Forget clicks, boxes and results."""
        shown = forget(shown)
        image = read_image(shown["path"]) if shown else None
        return [shown, image, *(None for _ in self.predictors), "", [], gr.DownloadButton(interactive=False)]

    @told
    def click_image(self, shown: dict, kind: str, event: gr.SelectData) -> list:
        """Take a click; with an object shown, find it."""
        shown = clicked(shown, kind, event.index)
        if shown["corner"] is not None:
            image = draw(read_image(shown["path"]), [], OVERLAY_WIDTH, drawn(shown))
            return [shown, np.asarray(image), *[gr.skip()] * (len(self.predictors) + 3)]
        # One box with points on it, or several boxes: the tracker takes nothing else.
        return self._in_image(shown, Asked((), tuple(shown["boxes"]), tuple(shown["points"]), None, None))

    @told
    def find_in_image(self, shown: dict, text: str, threshold: float) -> list:
        """Find all instances of a text."""
        if not shown:
            raise PredictError("there is no image yet; put one into the field on the left")
        return self._in_image(shown, Asked((text,), tuple(shown["boxes"]), (), None, threshold))

    def _in_image(self, shown: dict, asked: Asked) -> list:
        image_HW3 = read_image(shown["path"])
        refuse_misfit(asked, False, image_HW3.shape[:2])
        pictures, lines, rows = [], [], []
        for name, predictor in self.predictors.items():
            started = time.perf_counter()
            found = [row for instances in predictor.on_image(image_HW3, asked) for row in records(instances)]
            seconds = time.perf_counter() - started
            found = [row | {"id": number} for number, row in enumerate(found, 1)]
            line = f"**{name}**: {counted(len(found))} in {seconds:.2f} s"
            if asked.texts and not found:
                line += f"; the best score so far is {predictor.concepts.best_score:.3f}"
            lines.append(line)
            rows += [
                [
                    name,
                    one["id"],
                    one.get("text", ""),
                    one["score"],
                    "{:.0f}, {:.0f}, {:.0f}, {:.0f}".format(*one["box"]),
                ]
                for one in found
            ]
            about = {"input": Path(shown["path"]).name, "prompts": asked.as_json()}
            folder = Path(shown["folder"], "found", name)
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder, about, image_HW3, found)
            pictures.append(np.asarray(draw(image_HW3, found, OVERLAY_WIDTH, {})))
        canvas = np.asarray(draw(image_HW3, [], OVERLAY_WIDTH, asked.as_json()))
        return [shown, canvas, *pictures, "  \n".join(lines), rows, self._packed(shown)]

    def _packed(self, shown: dict) -> gr.DownloadButton:
        """Return the button that gives all that was found as one file."""
        folder = Path(shown["folder"])
        archive = shutil.make_archive(str(folder / "effsam3"), "zip", folder / "found")
        return gr.DownloadButton(value=archive, interactive=True)

    # ---- videos

    def _video_tab(self) -> None:
        shown = gr.State({})
        with gr.Row():
            with gr.Column(scale=2):
                file = gr.File(label="A video", type="filepath", elem_id="video-file", height=120)
                canvas = gr.Image(
                    label="Click on it", interactive=False, elem_id="video-canvas", buttons=["fullscreen"], height=380
                )
                first = gr.Slider(0, 1, 0, step=1, label="Track from frame", elem_id="video-first")
                kind = gr.Radio([ON, OFF, CORNER], value=ON, label="A click is", elem_id="video-kind")
                clear = gr.Button("Forget clicks and boxes")
                track = gr.Button("Track what is shown", variant="primary", elem_id="video-track")
                text = gr.Textbox(label="Text", placeholder="a dog", elem_id="video-text")
                threshold = gr.Slider(0, 0.95, 0.7, step=0.05, label="Score", elem_id="video-threshold")
                find = gr.Button("Track the text", variant="primary", elem_id="video-find")
                most = gr.Number(FRAMES, precision=0, minimum=1, label="Frames at most", elem_id="video-most")
            with gr.Column(scale=3):
                with gr.Row():
                    films = [
                        gr.Video(label=name, interactive=False, elem_id=f"video-{name}", autoplay=True, height=380)
                        for name in self.predictors
                    ]
                summary = gr.Markdown(elem_id="video-summary")
                download = gr.DownloadButton("Masks, boxes and films", interactive=False, elem_id="video-download")
        results = [*films, summary, download]
        file.upload(self.open_video, [file], [shown, canvas, first, *results], show_progress="minimal")
        first.release(self.show_frame, [shown, first], [shown, canvas])
        clear.click(self.show_frame, [shown, first], [shown, canvas])
        canvas.select(self.click_video, [shown, kind, first], [shown, canvas], show_progress="minimal")
        track.click(self.track_shown, [shown, first, most], results)
        gr.on([find.click, text.submit], self.track_text, [shown, first, most, text, threshold], results)

    @told
    def open_video(self, path: str) -> list:
        """Show the first frame of an uploaded video."""
        frames = read_video(path).frames
        shown = {"path": path, "folder": tempfile.mkdtemp(dir=self.folder)}
        slider = gr.Slider(maximum=max(frames - 1, 1), value=0)
        nothing = [None] * len(self.predictors)
        return [*self.show_frame(shown, 0)[:2], slider, *nothing, "", gr.DownloadButton(interactive=False)]

    @told
    def show_frame(self, shown: dict, first: float) -> list:
        """Show a frame; what was clicked on another is forgotten."""
        return [forget(shown), frame_of(shown, first) if shown else None]

    @told
    def click_video(self, shown: dict, kind: str, first: float, event: gr.SelectData) -> list:
        """Take a click; the mask on this frame shows what will be tracked."""
        shown, image_HW3 = clicked(shown, kind, event.index), frame_of(shown, first)
        found: list[dict] = []
        if shown["corner"] is None:
            asked = Asked((), tuple(shown["boxes"]), tuple(shown["points"]), None, None)
            predictor = next(iter(self.predictors.values()))
            found = [row for instances in predictor.on_image(image_HW3, asked) for row in records(instances)]
        return [shown, np.asarray(draw(image_HW3, found, OVERLAY_WIDTH, drawn(shown)))]

    @told
    def track_shown(self, shown: dict, first: float, most: float, progress=gr.Progress()) -> list:  # noqa: B008
        """Track what was clicked."""
        if not shown or not (shown["points"] or shown["boxes"]):
            raise PredictError("nothing is shown yet; click on an object in the frame on the left")
        asked = Asked((), tuple(shown["boxes"]), tuple(shown["points"]), None, None)
        return self._track(shown, asked, first, most, progress)

    @told
    def track_text(
        self,
        shown: dict,
        first: float,
        most: float,
        text: str,
        threshold: float,
        progress=gr.Progress(),  # noqa: B008
    ) -> list:
        """Track all instances of a text."""
        if not shown:
            raise PredictError("there is no video yet; put one into the field on the left")
        return self._track(shown, Asked((text,), (), (), None, threshold), first, most, progress)

    def _track(self, shown: dict, asked: Asked, first: float, most: float, progress: gr.Progress) -> list:
        films, lines = [], []
        for name, predictor in self.predictors.items():
            video = From(read_video(shown["path"]), int(first))
            refuse_misfit(asked, True, tuple(video.size))
            count, ids = min(int(most), video.frames), set()
            folder = Path(shown["folder"], "found", name)
            about = {"input": Path(shown["path"]).name, "first": int(first), "prompts": asked.as_json()}
            started = time.perf_counter()
            with video_predictions(folder, about, Path(shown["path"]).stem, tuple(video.size)) as written:
                for index, found, image_HW3, time_s in predictor.on_video(video, asked, count):
                    written.add(index, image_HW3, time_s, records(found))
                    ids |= {number for number, mask in zip(found.ids, found.masks_OHW, strict=True) if mask.any()}
                    progress((index + 1, count), desc=name, unit="frames")
            seconds = time.perf_counter() - started
            lines.append(
                f"**{name}**: {counted(len(ids))} in {count} frames, {seconds:.1f} s, {count / seconds:.1f} frames/s"
            )
            films.append(str(folder / "tracked.mp4"))
        return [*films, "  \n".join(lines), self._packed(shown)]


# ---- what was shown


def forget(shown: dict) -> dict:
    """Return what was shown without clicks and boxes."""
    return {**shown, "points": [], "boxes": [], "corner": None} if shown else {}


def clicked(shown: dict, kind: str, place: tuple[int, int]) -> dict:
    """Return what is shown after a click at x, y: a point, or one of the two corners of a box.

    Raises:
        PredictError: there is nothing to click on, or both corners are in one row or column.
    """
    if not shown:
        raise PredictError("there is nothing to click on; put a file into the field above")
    x, y = map(float, place)
    if kind != CORNER:
        # Points show one object, for which there can be one box.
        return {**shown, "points": [*shown["points"], (x, y, int(kind == ON))], "boxes": shown["boxes"][-1:]}
    if shown["corner"] is None:
        return {**shown, "corner": (x, y)}
    other_x, other_y = shown["corner"]
    if x == other_x or y == other_y:
        raise PredictError("both corners are in one line; click on two opposite corners of the box")
    box = min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y), 1
    return {**shown, "boxes": [*shown["boxes"], box], "corner": None, "points": []}


def drawn(shown: dict) -> dict:
    """Return what is shown as `draw` takes prompts; the first corner of a box as a point."""
    corner = [] if shown["corner"] is None else [(*shown["corner"], 1)]
    return {"points": [*shown["points"], *corner], "boxes": shown["boxes"]}


def frame_of(shown: dict, index: float) -> np.ndarray:
    """Return a frame of the video, uint8 RGB (H, W, 3)."""
    return np.ascontiguousarray(read_video(shown["path"]).read([int(index)])[0].transpose(1, 2, 0))


def counted(count: int) -> str:
    """Return how many instances there are, in words."""
    return f"{count} {'instance' if count == 1 else 'instances'}"
