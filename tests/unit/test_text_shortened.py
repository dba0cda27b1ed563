# SPDX-License-Identifier: Apache-2.0
"""RepMixer towers on short texts: the same features and gradients as padded to the whole table, for half the work."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import Sam3LiteTextTextModel

from effsam3.benchmarks.parts import Counter
from effsam3.errors import RecipeError
from effsam3.models.registry import TINY_TEXT_STUDENTS
from effsam3.models.text.student import fold_repmixer, text_student
from effsam3.models.text.tokens import PAD_ID, Tokenizer
from effsam3.recipe.reader import load_recipe

LENGTH = 32
TEXTS = ("a dog", "the red car on the left", "zebra", "two large striped zebras, drinking from a pond at noon in May")


def student(name, norms="batch", kernel=None):
    """A student whose norms and scales are no longer what they start as; its kernels may be others."""
    torch.manual_seed(0)
    model = text_student(name, LENGTH, 128, norms=norms)
    if kernel is not None:
        config = deepcopy(model.text_encoder.config)
        config.repmixer_kernel_size = kernel
        model = type(model)(config, 128, norms)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif key.endswith("layer_scale") or tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model.eval()


def by_transformers(model, ids_BL, mask_BL):
    """What transformers' own class makes of the texts padded to the whole table."""
    own = Sam3LiteTextTextModel(model.text_encoder.config).eval()
    own.load_state_dict(model.text_encoder.state_dict())
    missing = LENGTH - ids_BL.shape[1]
    ids = torch.nn.functional.pad(ids_BL, (0, missing), value=PAD_ID)
    mask = torch.nn.functional.pad(mask_BL, (0, missing))
    hidden = own(input_ids=ids, attention_mask=mask).last_hidden_state[:, : ids_BL.shape[1]]
    return own, model.text_projection(hidden) * model.feature_scale + model.feature_mean


@pytest.mark.parametrize("kernel", [3, 11])
@pytest.mark.parametrize("name", TINY_TEXT_STUDENTS)
@pytest.mark.parametrize("fold", [False, True])
@torch.no_grad()
def test_features_of_any_length_are_those_of_the_padded_text(name, kernel, fold):
    model = student(name, kernel=kernel)
    asked = fold_repmixer(model) if fold else model
    ids, mask = Tokenizer().encode(list(TEXTS), LENGTH)
    for length in range(2, ids.shape[1] + 1):
        ids_BL, mask_BL = ids[:, :length], mask[:, :length]
        _, wanted = by_transformers(model, ids_BL, mask_BL)
        torch.testing.assert_close(asked(ids_BL, mask_BL)[mask_BL], wanted[mask_BL], rtol=0, atol=2e-5)


def test_gradients_are_those_of_the_padded_text():
    model = student("tiny_text", "kept").train()
    ids_BL, mask_BL = Tokenizer().encode(list(TEXTS[:3]), LENGTH)
    assert ids_BL.shape[1] < LENGTH - 10
    own, wanted = by_transformers(model, ids_BL, mask_BL)
    wanted[mask_BL].square().sum().backward()
    model.zero_grad()
    model(ids_BL, mask_BL)[mask_BL].square().sum().backward()
    theirs = dict(own.named_parameters())
    for name, parameter in model.text_encoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_short_text_takes_less_than_half():
    """5 tokens of MobileCLIP-S0: 15 positions in the MLP of the first RepMixer and in the attention, 5 in the last."""
    with torch.device("meta"):
        model = text_student("mobileclip_s0", LENGTH, 256).eval()
        ids_BL, mask_BL = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    counted = {}
    for name, call in {
        "short": lambda: model(ids_BL, mask_BL),
        "padded": lambda: by_transformers(model, ids_BL, mask_BL),
    }.items():
        with torch.device("meta"), torch.no_grad(), Counter() as counter:
            call()
        counted[name] = counter.flops
    assert 2.2 < counted["padded"] / counted["short"] < 2.5


def test_kept_norms_compute_in_training_what_they_do_in_use():
    model = student("tiny_text", "kept")
    ids_BL, mask_BL = Tokenizer().encode(list(TEXTS), LENGTH)
    before = deepcopy(model.state_dict())
    in_use = model(ids_BL, mask_BL)
    in_training = model.train()(ids_BL, mask_BL)
    torch.testing.assert_close(in_training, in_use, rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.weight.requires_grad and not norm.training for norm in norms)


def test_norms_cannot_be_kept_of_weights_that_nobody_trained():
    changes = ["student=tiny_text", "student_norms=kept"]
    with pytest.raises(RecipeError, match="student_init=random has none"):
        load_recipe("smoke/text", changes)
    assert load_recipe("smoke/text", [*changes, "student_init=runs/other"]).student_norms == "kept"
