"""SAM 3's heads on any trunk's features, against transformers' own inference."""

import pytest
import torch

from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.detector import PHRASE_DIMS, Answers, answer, ask, detector_levels
from effsam3.models.heads.tracker import Shown, decode_shown, tracker_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.inference.concepts import encode_geometry_always
from effsam3.models.inference.prompted import load_tracker, prompted_masks
from effsam3.models.memory.prompts import NO_POINT
from effsam3.models.text.tokens import PromptTokenizer

SIDE = 224
BOXES = torch.tensor([[20.0, 30.0, 120.0, 150.0], [60.0, 10.0, 200.0, 90.0]])
PHRASES = ["a dog", "red car on the left", "sky"]
ON = [1, 0, 1]  # the image of each phrase


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture
def model(folder):
    return load_whole(model_class(read_config(folder).model_type), folder)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def asked(phrases=PHRASES, image_R=ON, box=None):
    given = ask(phrases, torch.tensor(image_R), PromptTokenizer())
    if box is not None:
        boxes = torch.tensor(box).expand(len(phrases), 1, 4)
        given = given._replace(boxes_RN4=boxes, box_labels_RN=torch.ones(len(phrases), 1).long())
    return given


def hooks(model):
    return [name for name, part in model.named_modules() if part._forward_hooks]


# ---- what is shown


def test_shown_objects_get_the_masks_that_inference_gives(folder, model, pixels):
    tracker = load_tracker(folder)
    for image in (0, 1):
        embeddings = tracker.get_image_embeddings(pixels[image : image + 1])
        with torch.no_grad():
            levels = tracker_levels(model, trunk_features(model, pixels))
            labels = torch.tensor([[2, 3]] * 2, dtype=torch.int32)
            (found,) = decode_shown(model, levels, Shown(torch.tensor([image] * 2), BOXES.view(-1, 2, 2), labels))
            point = Shown(torch.tensor([image]), BOXES[:1, None, :2], torch.ones(1, 1, dtype=torch.int32))
            (clicked,) = decode_shown(model, levels, point)
        for decoded, shown in ((found, (BOXES, None)), (clicked, (None, BOXES[:1, :2]))):
            logits, iou = prompted_masks(tracker, embeddings, *shown)
            assert torch.allclose(decoded.best(), logits, atol=1e-5)
            assert torch.allclose(decoded.iou_NM.max(1).values, iou, atol=1e-5)
    assert found.logits_NMLL.shape[1] == 1 and clicked.logits_NMLL.shape[1] == 3


def test_objects_with_other_prompts_do_not_change_a_mask(model, pixels):
    """A place that only fills up is a token for the decoder: it is cut off before."""
    with torch.no_grad():
        levels = tracker_levels(model, trunk_features(model, pixels))
        (alone,) = decode_shown(model, levels, Shown(torch.tensor([0]), BOXES[1:, None, :2], torch.ones(1, 1).int()))
        points = torch.stack([BOXES[0].view(2, 2), torch.cat([BOXES[1:, :2], torch.zeros(1, 2)])])
        labels = torch.tensor([[2, 3], [1, NO_POINT]], dtype=torch.int32)
        both = list(decode_shown(model, levels, Shown(torch.tensor([0, 0]), points, labels)))
    assert [part.objects_N.tolist() for part in both] == [[1], [0]]
    assert torch.allclose(both[0].logits_NMLL, alone.logits_NMLL, atol=1e-6)


# ---- what is asked for


@pytest.mark.parametrize("box", [None, [0.5, 0.4, 0.3, 0.2]])
def test_phrases_get_what_the_detector_answers_one_by_one(model, pixels, box):
    given, detector = asked(box=box), model.detector_model
    boxes = {} if box is None else {"input_boxes": given.boxes_RN4, "input_boxes_labels": given.box_labels_RN}
    with torch.no_grad():
        found = answer(model, detector_levels(model, trunk_features(model, pixels)), given)
        encode_geometry_always(detector)
        for row, image in enumerate(ON):
            own = detector(
                pixel_values=pixels[image : image + 1],
                input_ids=given.input_ids_RT[row : row + 1],
                attention_mask=given.attention_mask_RT[row : row + 1],
                **{name: tensor[row : row + 1] for name, tensor in boxes.items()},
                output_hidden_states=True,
            )
            pairs = [
                (found.masks_RQMM[row], own.pred_masks[0]),
                (found.semantic_RMM[row], own.semantic_seg[0, 0]),
                (found.boxes_LRQ4[-1, row], own.pred_boxes[0]),
                (found.logits_LRQ[-1, row], own.pred_logits[0]),
                (found.presence_LR[-1, row], own.presence_logits[0, 0]),
                (found.scores_RQ[row], (own.pred_logits.sigmoid() * own.presence_logits.sigmoid())[0]),
            ]
            # A layer's boxes are where the next one begins.
            centres, sizes = own.decoder_reference_boxes[1:, 0].split(2, -1)
            pairs.append((found.boxes_LRQ4[:-1, row], torch.cat([centres - sizes / 2, centres + sizes / 2], -1)))
            # The presence token is the first of what the decoder's layers return.
            decoder = detector.detr_decoder
            tokens_L1C = torch.stack(own.decoder_hidden_states[1:])[:, 0, 0]
            pairs.append(
                (found.presence_LR[:, row], decoder.presence_head(decoder.presence_layer_norm(tokens_L1C))[:, 0])
            )
            for ours, theirs in pairs:
                assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def test_phrases_share_one_pass_of_the_neck_and_leave_no_hook(model, pixels):
    passes, neck = [], model.detector_model.vision_encoder.neck
    counting = neck.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        levels = detector_levels(model, trunk_features(model, pixels))
        several = answer(model, levels, asked(PHRASES * 2, ON * 2))
        first = answer(model, levels, asked())
        with pytest.raises(RuntimeError):
            answer(model, levels, asked()._replace(input_ids_RT=torch.zeros(2, 32).long()))
    counting.remove()
    assert len(passes) == 1 and hooks(model) == []
    for whole, part, dim in zip(several, first, PHRASE_DIMS, strict=True):
        assert torch.allclose(whole.narrow(dim, 0, 3), part, atol=1e-6)
        assert torch.allclose(whole.narrow(dim, 3, 3), part, atol=1e-6)


@pytest.mark.parametrize("name", Answers._fields)
def test_every_answer_teaches_the_trunk_and_the_text_encoder_and_nothing_else(model, pixels, name):
    detector = model.detector_model
    model.requires_grad_(False)
    detector.vision_encoder.backbone.requires_grad_(True)
    detector.text_encoder.text_model.requires_grad_(True)
    found = getattr(answer(model, detector_levels(model, trunk_features(model, pixels)), asked()), name)
    found = found[0] if "_L" in name else found  # of the first layer: the later ones reach it, too
    (found * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    learning = {name: own for name, own in model.named_parameters() if own.requires_grad}
    assert len(learning) > 100
    assert [name for name, own in learning.items() if own.grad is None] == []
    assert [name for name, own in model.named_parameters() if own.grad is not None and name not in learning] == []
    assert all(own.grad.isfinite().all() for own in learning.values())


def test_phrase_by_phrase_the_same_gradients_take_less_memory(model, pixels):
    kept, gradients, answers = [], [], []
    for recompute in (False, True):
        sizes: dict[int, int] = {}
        feat = trunk_features(model, pixels).detach().requires_grad_()
        levels = detector_levels(model, feat)

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = answer(model, levels, asked(), recompute)
        kept.append(sum(sizes.values()))
        sum(part.square().mean() for part in found).backward()
        gradients.append(feat.grad)
        answers.append(found)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*answers, strict=True))
    assert gradients[0].any() and torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize("recompute", [False, True])
def test_no_phrases_are_refused(model, pixels, recompute):
    levels = detector_levels(model, trunk_features(model, pixels))
    nothing = asked().each(lambda tensor: tensor[:0])
    with pytest.raises(ValueError, match="no phrase is asked for"):
        answer(model, levels, nothing, recompute)
