# SPDX-License-Identifier: Apache-2.0
"""int8 and float16 payloads of the embedding store."""

import re

import numpy as np
import pytest
import torch

from effsam3.data.store.format import StoreError
from effsam3.data.store.reader import dequantise_int8, quantise_int8, to_float16


def test_int8_against_the_plain_formula():
    torch.manual_seed(0)
    features = torch.randn(3, 16, 12, 12) * torch.logspace(-3, 3, 16)[:, None, None]
    features[1, 5] = 0
    values, scale = quantise_int8(features)
    assert values.dtype == torch.int8 and scale.shape == (3, 16) and scale.dtype == torch.float32
    for b in range(3):
        for c in range(16):
            step = features[b, c].abs().max() / 127 if features[b, c].any() else torch.tensor(1.0)
            assert scale[b, c] == step
            assert (values[b, c] == torch.round(features[b, c] / step)).all()
    restored = dequantise_int8(values, scale)
    assert ((restored - features).abs() <= scale[..., None, None] * 0.5001).all()
    assert torch.cosine_similarity(restored.flatten(1), features.flatten(1)).min() > 0.9999
    assert not restored[1, 5].any()
    assert values.abs().max() == 127
    torch.testing.assert_close(quantise_int8(features.half()[0])[1], scale[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [65505.0, -1e6, float("inf"), float("nan")])
def test_values_that_float16_cannot_hold_are_refused(value):
    features = torch.zeros(2, 3, 3)
    features[1, 2, 0] = value
    if np.isfinite(value):
        with pytest.raises(StoreError, match=rf"'sa_1'.*{re.escape(f'{abs(value):g}')}.*embed.dtype: int8"):
            to_float16(features, "sa_1")
        assert quantise_int8(features)[1][1] > 500
    else:
        for use in (to_float16, quantise_int8):
            with pytest.raises(StoreError, match=r"'sa_1'.*not finite"):
                use(features, "sa_1")
    features[1, 2, 0] = 65504
    assert to_float16(features, "sa_1")[1, 2, 0] == 65504
