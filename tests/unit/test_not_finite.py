# SPDX-License-Identifier: Apache-2.0
"""A loss that is NaN or infinite: the run stops and names the samples, or leaves them out as if they had been zero.

Letters: B samples of a micro-batch, C channels.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from effsam3.data.captions.batches import CaptionBatches
from effsam3.errors import UserError
from effsam3.stages.text.training import TextStage
from effsam3.training.not_finite import MOST_IN_A_ROW, NotFinite

NAN, INFINITE = float("nan"), float("inf")


class Squares:
    """A stage whose loss is the mean square of what the student says."""

    def loss(self, student, batch):
        square = student(batch["x_BC"]).square().mean()
        return {"loss": 2 * square, "square": square}

    def samples(self, batch):
        return batch["names"]


def batch(name: str, worst: float = 0.0) -> dict:
    """Four samples, one of them holding a bad number."""
    x_BC = torch.randn(4, 3, generator=torch.Generator().manual_seed(len(name)))
    x_BC[2, 1] += worst
    return {"x_BC": x_BC, "names": [f"{name}-{place}" for place in range(4)]}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()


@pytest.fixture
def finite(tmp_path):
    """Make a NotFinite of a run that accumulates two micro-batches."""

    def make(skip: bool) -> NotFinite:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        found = NotFinite(Squares(), Accelerator(cpu=True, gradient_accumulation_steps=2), tmp_path, skip)
        found.begin(7)
        return found

    return make


def learn(finite: NotFinite, student, *batches) -> list[dict]:
    """Do what the loop does with a step's micro-batches, less the optimizer's step."""
    found = []
    for one in batches:
        with finite.accelerator.accumulate(student):
            found.append(finite.loss(student, one))
            finite.accelerator.backward(found[-1]["loss"])
    return found


@pytest.mark.parametrize("worst", [NAN, INFINITE])
def test_stop_names_the_samples_of_the_step(finite, student, tmp_path, worst):
    found = finite(skip=False)
    learn(found, student, batch("good"), batch("bad", worst))
    assert found.count(torch.tensor(1.0)) == 1
    with pytest.raises(UserError, match=r"the loss is nan on rank 0 at step 7; .*not_finite.json .*not_finite=skip"):
        found.refuse(1)
    written = json.loads((tmp_path / "not_finite.json").read_text())
    good, bad = written["micro_batches"]
    assert written["step"] == 7 and good["samples"] == [f"good-{place}" for place in range(4)]
    assert isinstance(good["loss"], float) and bad == {"rank": 0, "loss": "nan", "samples": batch("bad")["names"]}


def test_a_finite_step_goes_on(finite, student, tmp_path):
    found = finite(skip=False)
    terms = learn(found, student, batch("good"), batch("other"))
    assert found.count(torch.tensor(1.0)) == 0 and terms[0]["loss"] > 0
    found.refuse(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("grad_norm", "bad"), [(None, 0), (3.0, 0), (NAN, 1), (INFINITE, 1), (-1.0, 1)])
def test_the_gradient_s_norm(finite, student, grad_norm, bad):
    """DeepSpeed says -1 of one that is not finite, and keeps it to itself at stage 0."""
    found = finite(skip=False)
    learn(found, student, batch("good"))
    assert found.count(grad_norm) == bad
    if bad:
        with pytest.raises(UserError, match="the gradient is not finite at step 7"):
            found.refuse(bad)


def test_what_is_left_out_counts_as_zero(finite, student):
    reference = copy.deepcopy(student)
    (Squares().loss(reference, batch("good"))["loss"] / 2).backward()  # half: of two micro-batches
    found = finite(skip=True)
    good, left_out = learn(found, student, batch("good"), batch("bad", NAN))
    assert good["loss"] > 0 and left_out == {"loss": 0, "square": 0}
    for ours, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert found.count(torch.tensor(1.0)) == 0


def test_what_is_left_out_does_not_count_for_batchnorm(finite, student):
    reference = copy.deepcopy(student)
    Squares().loss(reference, batch("good"))
    learn(finite(skip=True), student, batch("good"), batch("bad", NAN))
    for (name, ours), theirs in zip(student.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_next_step_is_whole_again(finite, student, tmp_path):
    found = finite(skip=True)
    learn(found, student, batch("good"), batch("bad", NAN))
    found.begin(8)
    terms = learn(found, student, batch("worse", NAN), batch("good"))  # one of the step before takes its place
    assert terms[0]["loss"] == 0 and terms[1]["loss"] > 0
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["micro_batch"]) for line in lines] == [(7, 1), (8, 0)]
    assert lines[1]["ranks"] == [{"rank": 0, "loss": "nan", "samples": batch("worse")["names"]}]


def test_ten_in_a_row_are_left_out_and_no_more(finite, student, tmp_path):
    found = finite(skip=True)
    learn(found, student, batch("good"), batch("bad", NAN), batch("good"))
    for step in range(8, 8 + MOST_IN_A_ROW):
        found.begin(step)
        learn(found, student, batch("bad", NAN))
    found.begin(20)
    with pytest.raises(UserError, match="10 micro-batches before it.* take these samples out of the data"):
        learn(found, student, batch("worse", NAN))
    assert json.loads((tmp_path / "not_finite.json").read_text())["micro_batches"][0]["samples"][0] == "worse-0"


def test_the_first_micro_batch_of_a_launch_cannot_be_left_out(finite, student):
    with pytest.raises(UserError, match="the first micro-batch since the start"):
        learn(finite(skip=True), student, batch("bad", NAN), batch("good"))


def test_naming_texts_does_not_list_all_keys():
    """It is done for every micro-batch, and there may be a hundred million texts."""
    asked = []

    class Part:
        def __len__(self):
            return 100_000_000

        def keys(self, positions):
            asked.append(list(positions))
            return [f"key-{position}" for position in positions]

    stage = SimpleNamespace(train_data=CaptionBatches(Part(), None))
    assert TextStage.samples(stage, {"positions": torch.tensor([7, 3])}) == ["key-7", "key-3"]
    assert asked == [[7, 3]]
