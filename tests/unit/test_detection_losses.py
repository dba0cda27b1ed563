"""Losses on a detector's answers against numpy, loops and counting by hand."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effsam3.losses.answers import teacher_loss
from effsam3.losses.detection import Instances, annotated_loss, match
from effsam3.models.heads.detector import PHRASE_DIMS, Answers

LAYERS, PHRASES, QUERIES, SIDE = 3, 4, 5, 6
COUNTS = [2, 0, 1, 3]  # instances of each phrase
EVERY = torch.ones(PHRASES).bool()


def boxes(generator, *shape):
    corner = torch.rand(*shape, 2, generator=generator) * 0.6
    return torch.cat([corner, corner + 0.1 + torch.rand(*shape, 2, generator=generator) * 0.3], -1)


def answers(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 2 * torch.randn(*shape, generator=generator)

    return Answers(
        draw(LAYERS, PHRASES, QUERIES),
        draw(LAYERS, PHRASES),
        boxes(generator, LAYERS, PHRASES, QUERIES),
        draw(PHRASES, QUERIES, SIDE * SIDE),  # with the pixels below a query is its mask, but for the offset
        draw(PHRASES, QUERIES),
        torch.eye(SIDE * SIDE).view(-1, SIDE, SIDE).expand(PHRASES, -1, -1, -1),
        draw(PHRASES, SIDE, SIDE),
    )


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(9)
    valid = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
    masks = (torch.rand(PHRASES, max(COUNTS), SIDE, SIDE, generator=generator) > 0.6).float()
    return Instances(boxes(generator, PHRASES, max(COUNTS)), masks, valid)


def learning(values):
    return Answers(*(value.clone().requires_grad_() for value in values))


# ---- formulas once more, one number at a time


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce_of(x, t):
    return -(t * np.log(sigmoid(x)) + (1 - t) * np.log(1 - sigmoid(x)))


def dice_of(x, t):
    return 1 - (2 * (sigmoid(x) * t).sum() + 1) / (sigmoid(x).sum() + t.sum() + 1)


def focal_of(x, t):
    p = sigmoid(x)
    return np.where(t > 0, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)).mean()


def l1_of(a, b):
    def middle(box):
        return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]])

    return np.abs(middle(a) - middle(b)).sum()


def giou_of(a, b):
    def area(box):
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - both
    return both / union - (hull - union) / hull


def cost_of(logit, box, target):
    p = sigmoid(logit)
    score = -0.25 * (1 - p) ** 2 * np.log(p) + 0.75 * p**2 * np.log(1 - p)
    return 2 * score + 5 * l1_of(box, target) - 2 * giou_of(box, target)


def cheapest(logits_Q, boxes_Q4, target_N4):
    """Try all ways of giving every instance a query of its own."""
    ways = permutations(range(len(logits_Q)), len(target_N4))
    return min(ways, key=lambda way: sum(cost_of(logits_Q[q], boxes_Q4[q], target_N4[n]) for n, q in enumerate(way)))


def numbers(values):
    """Return the answers as numpy has them, with the masks of all queries."""
    named = values._asdict() | {"masks_RQMM": values.masks_RQMM}
    return SimpleNamespace(**{name: value.detach().double().numpy() for name, value in named.items()})


def expected_of_annotations(found, given):
    found, terms = (
        numbers(found),
        dict.fromkeys(("box", "giou", "score", "presence", "focal", "dice", "semantic"), 0.0),
    )
    for phrase, count in enumerate(COUNTS):
        target, masks = (value[phrase, :count].double().numpy() for value in given[:2])
        for layer in range(LAYERS):
            logits, own = found.logits_LRQ[layer, phrase], found.boxes_LRQ4[layer, phrase]
            terms["presence"] += bce_of(found.presence_LR[layer, phrase], count > 0) / LAYERS
            if not count:
                continue
            way = cheapest(logits, own, target)
            for instance, query in enumerate(way):
                terms["box"] += l1_of(own[query], target[instance])
                terms["giou"] += 1 - giou_of(own[query], target[instance])
                if layer == LAYERS - 1:
                    terms["focal"] += focal_of(found.masks_RQMM[phrase, query], masks[instance])
                    terms["dice"] += dice_of(found.masks_RQMM[phrase, query], masks[instance])
            for query in range(QUERIES):
                x = logits[query]
                terms["score"] += 2 * bce_of(x, 1) if query in way else sigmoid(x) ** 2 * bce_of(x, 0)
        union = masks.max(0) if count else np.zeros((SIDE, SIDE))
        terms["semantic"] += bce_of(found.semantic_RMM[phrase], union).mean()
        terms["semantic"] += dice_of(found.semantic_RMM[phrase], union) if count else 0
    return {name: value / PHRASES for name, value in terms.items()}


def expected_of_teacher(student, teacher, found):
    own, other = numbers(student), numbers(teacher)
    names = ("presence", "score", "box", "giou", "bce", "dice", "semantic")
    terms = dict.fromkeys(names, 0.0)
    for phrase in range(PHRASES):
        there = sigmoid(other.presence_LR[-1, phrase])
        for layer in range(LAYERS):
            presence = bce_of(own.presence_LR[layer, phrase], sigmoid(other.presence_LR[layer, phrase]))
            terms["presence"] += presence / LAYERS
        for query in range(QUERIES):
            score = there * sigmoid(other.logits_LRQ[-1, phrase, query])
            for layer in range(LAYERS):
                place = (layer, phrase, query)
                logit = sigmoid(other.logits_LRQ[place])
                terms["score"] += bce_of(own.logits_LRQ[place], logit) * there / LAYERS
                terms["box"] += score * l1_of(own.boxes_LRQ4[place], other.boxes_LRQ4[place]) / LAYERS
                terms["giou"] += score * (1 - giou_of(own.boxes_LRQ4[place], other.boxes_LRQ4[place])) / LAYERS
            if score > found:
                mask, target = own.masks_RQMM[phrase, query], sigmoid(other.masks_RQMM[phrase, query])
                terms["bce"] += score * bce_of(mask, target).mean()
                terms["dice"] += score * dice_of(mask, target)
        terms["semantic"] += bce_of(own.semantic_RMM[phrase], sigmoid(other.semantic_RMM[phrase])).mean()
    return {name: value / PHRASES for name, value in terms.items()}


def floats(terms):
    return {name: float(value.detach()) for name, value in terms.items()}


# ---- matching


def test_the_matching_is_the_cheapest_of_all(given):
    found = answers()
    for layer in range(LAYERS):
        query = match(found.logits_LRQ[layer], found.boxes_LRQ4[layer], given.boxes_RN4, given.valid_RN)
        for phrase, count in enumerate(COUNTS):
            one = (found.logits_LRQ[layer, phrase], found.boxes_LRQ4[layer, phrase], given.boxes_RN4[phrase, :count])
            way = cheapest(*(value.double().numpy() for value in one))
            assert query[phrase].tolist() == [*way, *[-1] * (max(COUNTS) - count)]


def test_more_instances_than_queries_leave_some_without(given):
    found = answers()
    logits, own = found.logits_LRQ[0, :, :2], found.boxes_LRQ4[0, :, :2]
    query = match(logits, own, given.boxes_RN4, given.valid_RN)
    assert [(row >= 0).sum().item() for row in query] == [2, 0, 1, 2]
    assert sorted(query[3].tolist()) == [-1, 0, 1]
    crowd = Instances(*(value.repeat_interleave(200, 1) for value in given))
    assert all(value.isfinite() for value in annotated_loss(found, crowd, EVERY).values())


def test_a_detector_gone_wrong_is_left_to_the_loss(given):
    for wrong in (float("nan"), float("inf")):
        found = answers()
        query = match(found.logits_LRQ[0] * wrong, found.boxes_LRQ4[0] * wrong, given.boxes_RN4, given.valid_RN)
        assert ((query >= 0).sum(1) == torch.tensor(COUNTS)).all()
    terms = annotated_loss(Answers(*(value * float("nan") for value in found)), given, EVERY)
    assert all(value.isnan() for value in terms.values())


# ---- annotations


def test_terms_of_annotations(given):
    found = answers()
    assert floats(annotated_loss(found, given, EVERY)) == pytest.approx(
        expected_of_annotations(found, given), rel=1e-4
    )


def test_masks_of_another_side_are_averaged(given):
    found = answers()
    large = given._replace(masks_RNMM=given.masks_RNMM.repeat_interleave(3, -1).repeat_interleave(3, -2))
    assert floats(annotated_loss(found, large, EVERY)) == pytest.approx(floats(annotated_loss(found, given, EVERY)))


def test_the_order_of_instances_and_the_division_of_a_batch_change_nothing(given):
    found = answers()
    whole = floats(annotated_loss(found, given, EVERY))
    order = Instances(*(value[:, [2, 0, 1]] for value in given))
    assert floats(annotated_loss(found, order, EVERY)) == pytest.approx(whole, rel=1e-5)
    parts = []
    for half in (slice(0, 1), slice(1, None)):
        own = Answers(*(value[:, half] if dim else value[half] for value, dim in zip(found, PHRASE_DIMS, strict=True)))
        part = annotated_loss(own, Instances(*(value[half] for value in given)), EVERY[half])
        parts.append({name: value * len(EVERY[half]) / PHRASES for name, value in floats(part).items()})
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole, rel=1e-5)


def test_what_is_not_annotated_adds_nothing(given):
    found = learning(answers())
    known = torch.tensor([True, True, False, True])
    terms = annotated_loss(found, given, known)
    sum(terms.values()).backward()
    for name, value in found._asdict().items():
        gradient = value.grad.movedim(1, 0) if "_L" in name else value.grad
        assert not gradient[2].any() and gradient[3].any(), name


@pytest.mark.parametrize("places", [3, 0])
def test_a_batch_without_instances_still_reaches_every_output(given, places):
    nothing = Instances(*(value[:, :places] for value in given))._replace(valid_RN=torch.zeros(PHRASES, places).bool())
    found = learning(answers())
    terms = annotated_loss(found, nothing, ~EVERY)
    assert floats(terms) == dict.fromkeys(terms, 0.0)
    sum(terms.values()).backward()
    assert all(value.grad is not None and not value.grad.any() for value in found)
    # Phrases that are known to be absent teach presence and the mask of all, and no query.
    found = learning(answers())
    sum(annotated_loss(found, nothing, EVERY).values()).backward()
    assert (found.presence_LR.grad > 0).all() and (found.semantic_RMM.grad > 0).all()
    assert not found.logits_LRQ.grad.any() and not found.mask_queries_RQC.grad.any()


def test_gradients_point_to_the_truth(given):
    found = learning(answers())
    annotated_loss(found, given, EVERY)["score"].backward()
    query = match(found.logits_LRQ[-1], found.boxes_LRQ4[-1], given.boxes_RN4, given.valid_RN)
    raised = torch.zeros(PHRASES, QUERIES).bool()
    for phrase, own in enumerate(query.tolist()):
        raised[phrase, [place for place in own if place >= 0]] = True
    there = torch.tensor(COUNTS) > 0
    gradient = found.logits_LRQ.grad[-1]
    assert (gradient[raised] < 0).all() and (gradient[~raised & there[:, None]] > 0).all()


# ---- a teacher's answers


@pytest.mark.parametrize("found", [0.3, 0.0])
def test_terms_of_a_teacher(found):
    student, teacher = answers(1), answers(2)
    expected = expected_of_teacher(student, teacher, found)
    assert floats(teacher_loss(student, teacher, found=found)) == pytest.approx(expected, rel=1e-4)


def test_a_student_that_answers_alike_has_nothing_to_learn():
    teacher = answers(2)
    student = learning(teacher)
    terms = teacher_loss(student, teacher, found=0.0)
    assert floats(terms)["box"] == 0 and floats(terms)["giou"] == pytest.approx(0, abs=1e-6)
    sum(value for name, value in terms.items() if name not in ("box", "giou", "dice")).backward()
    assert all(value.grad.abs().max() < 1e-6 for name, value in student._asdict().items() if name != "boxes_LRQ4")
    other = learning(answers(3))
    terms = teacher_loss(other, teacher)
    sum(terms.values()).backward()
    assert ((other.presence_LR.grad > 0) == (other.presence_LR > teacher.presence_LR)).all()
    assert ((other.logits_LRQ.grad > 0) == (other.logits_LRQ > teacher.logits_LRQ)).all()


def test_only_the_best_masks_are_taught_and_only_of_phrases_that_count():
    teacher, student = answers(2), learning(answers(1))
    counted = torch.tensor([True, False, True, True])
    terms = teacher_loss(student, teacher, counted, found=0.0, most=1)
    (terms["bce"] + terms["dice"]).backward()
    taught = student.mask_queries_RQC.grad.any(2)
    best = teacher.scores_RQ.argmax(1)
    assert [row.nonzero().flatten().tolist() for row in taught] == [
        [int(place)] if counts else [] for place, counts in zip(best, counted, strict=True)
    ]
    none = teacher_loss(learning(answers(1)), teacher, ~EVERY)
    assert floats(none) == dict.fromkeys(none, 0.0) and all(value.requires_grad for value in none.values())


def test_a_dry_run_needs_no_contents(given):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        own, other = (Answers(*map(fake.from_tensor, answers(seed))) for seed in (1, 2))
        terms = [annotated_loss(own, Instances(*map(fake.from_tensor, given)), fake.from_tensor(EVERY))]
        terms.append(teacher_loss(own, other))
    assert all(value.shape == () for part in terms for value in part.values())
