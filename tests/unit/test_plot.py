# SPDX-License-Identifier: Apache-2.0
"""The verb `plot`: which curves are drawn, how, and where the picture goes."""

import numpy as np
import pytest
from PIL import Image

from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.plot import choose, plot
from effsam3.training.curves import draw, read_curves, smoothed
from effsam3.training.report import Report


def train(folder, scale=1.0, metric="val/cosine", steps=400):
    """Leave behind the metrics that `train` writes: logged every 10 steps, validated every 100."""
    report = Report(folder)
    report.metrics({metric: 0.0}, 0)
    for step in range(10, steps + 1, 10):
        values = {"train/loss": scale * 10 / step, "train/mse": 5 / step, "train/lr": 1e-3 * (1 - step / 500)}
        values |= {"perf/samples_per_s": 16.0, "perf/data_wait": 0.03, "train/grad_norm": 0.25 + step % 3}
        report.metrics(values, step)
        if step % 100 == 0:
            report.metrics({metric: step / 500}, step)
    return folder


COLOURS = ("#1f77b4", "#ff7f0e")  # matplotlib's first two


def pixels_of(path, colour):
    """Count the pixels of a picture that have a colour such as #0072B2."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def test_one_run_goes_into_its_folder_several_beside_the_first(tmp_path, capsys):
    a, b = train(tmp_path / "a"), train(tmp_path / "b", scale=3.0)
    assert main(["plot", str(a)]) == 0
    assert main(["plot", str(a), str(b), str(a / ".." / "a")]) == 0
    assert capsys.readouterr().out == f"{a}/curves.png: a\n{tmp_path}/curves.png: a, b\n"
    one, two = a / "curves.png", tmp_path / "curves.png"
    assert Image.open(one).size == Image.open(two).size == (1600, 960)
    assert pixels_of(one, COLOURS[0]) > 500 and pixels_of(one, COLOURS[1]) == 0
    assert pixels_of(two, COLOURS[0]) > 500 and pixels_of(two, COLOURS[1]) > 500
    assert sorted(path.name for path in a.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_panels_of_what_the_runs_have(tmp_path):
    train(tmp_path / "a"), train(tmp_path / "b", metric="val/j", steps=200)
    curves = {name: read_curves(tmp_path / name) for name in "ab"}
    figure = draw(curves, ["train/loss", "val/j", "train/mse"], 0.5)
    loss, j, mse = figure.axes
    assert [axis.get_title() for axis in (loss, j, mse)] == ["train/loss", "val/j", "train/mse"]
    assert [axis.get_yscale() for axis in (loss, j, mse)] == ["log", "linear", "log"]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    assert [line.get_color() for line in loss.lines] == ["C0", "C0", "C1", "C1"]
    raw, smooth = loss.lines[2:]  # of b
    assert list(raw.get_xdata()) == list(range(10, 201, 10))
    assert list(raw.get_ydata()) == [10 / step for step in range(10, 201, 10)]
    assert raw.get_alpha() < 0.5 and list(smooth.get_ydata()) == smoothed(raw.get_ydata(), 0.5)
    (line,) = j.lines  # b alone has it, and it is not smoothed
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 100, 200], [0.0, 0.2, 0.4])
    assert line.get_color() == "C1"


def test_without_a_wish_the_choice_is_six_panels_and_short_curves_are_smoothed_less(tmp_path, monkeypatch):
    train(tmp_path / "a"), train(tmp_path / "b", scale=3.0)
    drawn = []

    def note(curves, metrics, smooth):
        assert curves == {name: read_curves(tmp_path / name) for name in "ab"}
        drawn.append((metrics, draw(curves, metrics, smooth)))
        return drawn[-1][1]

    monkeypatch.setattr("effsam3.plot.draw", note)
    plot([str(tmp_path / "a"), str(tmp_path / "b")])
    metrics, figure = drawn[0]
    losses = ["train/loss", "val/cosine", "train/lr", "train/grad_norm"]
    assert metrics == [*losses, "perf/samples_per_s", "perf/data_wait"]
    raw, smooth = figure.axes[0].lines[:2]
    assert list(smooth.get_ydata()) == smoothed(raw.get_ydata(), 0.75)  # 40 points: spans four of them
    assert len(figure.axes[2].lines) == 2  # the learning rate is exact


def test_smoothing_is_a_mean_with_weights_that_fade():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for at, value in enumerate(smoothed(values, 0.8)):
        weights = [0.8 ** (at - past) for past in range(at + 1)]
        expected = sum(w * v for w, v in zip(weights, values[: at + 1], strict=True)) / sum(weights)
        assert value == pytest.approx(expected)
    assert smoothed(values, 0.0) == values


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    report = Report(tmp_path)
    for step, value in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        report.metrics({"train/grad_norm": value}, step)
    assert read_curves(tmp_path) == {"train/grad_norm": [(0, 1.0), (2, 2.0)]}


@pytest.mark.parametrize(
    ("name", "values", "scale"),
    [
        ("train/loss", [100, 1], "log"),
        ("train/loss", [10, 1], "linear"),
        ("train/loss", [100, 0], "linear"),
        ("train/lr", [100, 1], "linear"),
        ("val/cosine", [100, 1], "linear"),
    ],
)
def test_a_logarithmic_scale_where_it_helps(name, values, scale):
    assert draw({"a": {name: list(enumerate(values))}}, [name], None).axes[0].get_yscale() == scale


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    a, b = train(tmp_path / "x" / "a"), train(tmp_path / "y" / "a")
    assert plot([str(a), str(b)], str(tmp_path / "both.png")) == f"{tmp_path}/both.png: {a}, {b}"


def test_metrics_by_their_short_names():
    known = ["train/loss", "train/cosine", "val/cosine", "perf/data_wait"]
    assert choose("loss, val/cosine,data_wait", known) == ["train/loss", "val/cosine", "perf/data_wait"]
    assert choose("cosine", known) == ["train/cosine"]
    for asked, message in [
        ("los", "no run has 'los'; did you mean loss?"),
        ("val/cosin", "no run has 'val/cosin'; did you mean val/cosine?"),
        ("a,b,c,d,e,f,g", "no run has 'a'"),
    ]:
        with pytest.raises(UserError, match=f"--metrics: {message}"):
            choose(asked, known)
    with pytest.raises(UserError, match="7 are asked for, a picture has room for 6"):
        choose("a,b,c,d,e,f,g", [f"train/{letter}" for letter in "abcdefg"])


def test_runs_without_curves_are_named(tmp_path):
    a, out = train(tmp_path / "a"), tmp_path / "made" / "x.svg"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").touch()
    lines = plot([str(a), str(tmp_path / "b"), "nowhere"], str(out)).splitlines()
    assert lines[0] == f"{out}: a" and out.read_text().lstrip().startswith("<?xml")
    assert "b/metrics.jsonl holds no numbers yet" in lines[1] and "there is no run folder nowhere" in lines[2]
    with pytest.raises(UserError, match="holds no numbers yet"):
        plot([str(tmp_path / "b")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smooth", "1"], "--smooth 1: the weight of the past is at least 0 and below 1"),
        (["--out", "x.jpg"], "--out x.jpg: the name of a picture ends in .png, .pdf, .svg"),
    ],
)
def test_wrong_options_of_plot(tmp_path, options, message, capsys):
    assert main(["plot", str(train(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err
