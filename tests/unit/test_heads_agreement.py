"""What a chassis' heads make of a student's features, next to the teacher's: by hand, and trunks told apart."""

from operator import itemgetter

import numpy as np
import pytest
import torch

from effsam3.data.synthetic.concepts import PHRASES, draw_scene
from effsam3.data.transforms import normalise
from effsam3.losses.agreement import agreement, answer_sums, mask_sums, nothing_compared
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.agreement import agreement_sums
from effsam3.models.heads.detector import Answers, ask
from effsam3.models.heads.tracker import Shown
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.text.tokens import PromptTokenizer

SIDE, IMAGES = 160, 6


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


def answers(presence, scores, boxes):
    """Answers to two phrases by two queries: probabilities, and the boxes of the queries of both."""
    boxes = torch.tensor(boxes).expand(1, 2, 2, 4)
    queries, offsets, pixels = torch.zeros(2, 2, 5), torch.zeros(2, 2), torch.zeros(2, 5, 3, 3)
    return Answers(logit([scores]), logit([presence]), boxes, queries, offsets, pixels, pixels[:, 0])


def test_agreement_by_hand():
    left, right, half = [0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0], [0.0, 0.0, 0.2, 0.4]
    teacher = answers([0.8, 0.1], [[0.5, 0.25], [0.5, 0.5]], [left, right])
    student = answers([0.6, 0.3], [[0.5, 0.5], [0.5, 0.5]], [left, half])
    found = agreement(nothing_compared("cpu") | answer_sums(student, teacher))
    there, absent = (0.6 + 0.1) / (0.8 + 0.3), (0.2 + 0.7) / (0.4 + 0.9)
    assert found["heads_presence"] == pytest.approx((there + absent) / 2)
    # Scores of the first phrase: .4 and .2 by the teacher, .3 and .3; of the second: .05 twice, .15 twice. The second
    # query's boxes lie apart.
    assert found["heads_queries"] == pytest.approx((0.3 + 0.05) / (0.4 + 0.3 + 0.15 + 0.15))
    assert found["heads"] == pytest.approx((found["heads_presence"] + found["heads_queries"]) / 2)
    alone = agreement(nothing_compared("cpu") | answer_sums(student, teacher, torch.tensor([True, False])))
    assert alone["heads_queries"] == pytest.approx(0.3 / (0.4 + 0.3))

    masks = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    sums = mask_sums(masks, torch.tensor([[[1.0, -1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]]))
    assert agreement(nothing_compared("cpu") | sums) == {"heads": 0.75, "heads_masks": 0.75}
    assert agreement(nothing_compared("cpu")) == {}


# ---- trunks told apart


@pytest.fixture(scope="module")
def model():
    folder = chassis_folder("tiny_concepts")
    return load_whole(model_class(read_config(folder).model_type), folder)


@pytest.fixture(scope="module")
def given(model):
    """Features of drawn images, what is shown on them, and what is asked: one phrase that is there and one more."""
    scenes = [draw_scene(SIDE, np.random.default_rng([5, number])) for number in range(IMAGES)]
    pixels = torch.stack([normalise(torch.from_numpy(scene.image_HW3).permute(2, 0, 1)[None])[0] for scene in scenes])
    boxes, image_O = [], []
    for image, scene in enumerate(scenes):
        for mask in scene.masks_NHW:
            rows, columns = np.nonzero(mask)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            image_O.append(image)
    points = torch.tensor(np.array(boxes), dtype=torch.float32).view(-1, 2, 2)
    shown = Shown(torch.tensor(image_O), points, torch.tensor([[2, 3]] * len(boxes), dtype=torch.int32))
    phrases = [name for number, scene in enumerate(scenes) for name in (scene.phrases[0], PHRASES[number])]
    asked = ask(phrases, torch.arange(IMAGES).repeat_interleave(2), PromptTokenizer())
    with torch.no_grad():
        return trunk_features(model, pixels), shown, asked


def judge(model, feat, given):
    target, shown, asked = given
    return agreement(agreement_sums(model, feat, model, target, shown, asked))


def test_a_trunk_is_judged_by_what_the_heads_make_of_it(model, given):
    target = given[0]
    own = judge(model, target, given)
    assert own == pytest.approx(dict.fromkeys(("heads", "heads_masks", "heads_presence", "heads_queries"), 1.0))
    # From the teacher's own features to noise of the same mean and deviation.
    noise = (
        torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) * target.std((0, 2, 3))[:, None, None]
    )
    random = target.mean((0, 2, 3))[:, None, None] + noise
    found = [own] + [judge(model, torch.lerp(target, random, share), given) for share in (0.3, 1.0)]
    for name in ("heads", "heads_masks", "heads_queries"):
        values = [one[name] for one in found]
        assert values == sorted(values, reverse=True) and values[0] - values[2] > 0.15, (name, values)
    # Nobody has taught this chassis what is there.
    assert found[2]["heads_presence"] < 0.99


def test_batches_add_up_and_images_without_prompts_do_not_count(model, given):
    target, shown, asked = given
    feat = target.flip(2)
    whole = agreement_sums(model, feat, model, target, shown, asked)
    none = Shown(*(tensor[:0] for tensor in shown)), asked.each(lambda own: own[:0])
    assert {name: float(value) for name, value in agreement_sums(model, feat, model, target, *none).items()} == (
        dict.fromkeys(whole, 0.0)
    )
    parts = []
    for image in range(IMAGES):
        own, rows = shown.image_O == image, asked.image_R == image
        one = Shown(torch.ones_like(shown.image_O[own]), *(tensor[own] for tensor in shown[1:]))
        two = asked.each(itemgetter(rows))._replace(image_R=torch.ones_like(asked.image_R[rows]))
        # Behind another image, which is not prompted.
        pair = (torch.cat([part[image - 1 : image or None], part[image : image + 1]]) for part in (feat, target))
        feat_2, target_2 = pair
        parts.append(agreement_sums(model, feat_2, model, target_2, one, two))
    added = {name: float(sum(part[name] for part in parts)) for name in whole}
    assert added == pytest.approx({name: float(value) for name, value in whole.items()}, rel=1e-4)
