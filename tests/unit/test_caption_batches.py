# SPDX-License-Identifier: Apache-2.0
"""Batches of texts from a store: a record that was made of other tokens is never learned from."""

import numpy as np
import pytest

from effsam3.data.captions.batches import CaptionBatches
from effsam3.data.captions.cleaning import code_of, key_of
from effsam3.data.store.format import Field, StoreError, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.models.text.tokens import Tokenizer, pad, tokenizer_fingerprint

TEXTS = ["a dog", "two dogs on a lawn"]


class Part:
    """Texts and their keys, as `captions.Part` gives them."""

    def __len__(self):
        return len(TEXTS)

    def texts(self, positions):
        return [TEXTS[position] for position in positions]

    def keys(self, positions):
        return [key_of(code_of(TEXTS[position])) for position in positions]


def encode(texts):
    return pad(Tokenizer().tokenize(texts, 32))


def test_a_record_of_another_number_of_tokens_is_named(tmp_path):
    fields = [Field("features", "float16", (32, 4)), Field("length", "int32", (1,))]
    create_store(tmp_path, fields, {})
    part = Part()
    with StoreWriter(tmp_path, 0) as writer:
        for key, length in zip(part.keys(range(2)), (4, 9), strict=True):  # "a dog" has 4 tokens, the other 7
            features = np.zeros((32, 4), np.float16)
            writer.write(key, {"features": features, "length": np.array([length], np.int32)})
    finish_store(tmp_path, part.keys(range(2)))
    batches = CaptionBatches(part, encode, StoreReader(tmp_path))
    assert batches.__getitems__([0])["length"].tolist() == [[4]]
    with pytest.raises(StoreError, match=f"1 of 2 records have another number of tokens .*{part.keys([1])[0]}"):
        batches.__getitems__([0, 1])


def test_the_fingerprint_is_the_tokenizers(monkeypatch):
    own = tokenizer_fingerprint()
    assert own == tokenizer_fingerprint()
    monkeypatch.setattr("effsam3.models.text.tokens.clean", str.lower)  # without mending encodings, entities, quotes
    assert tokenizer_fingerprint() != own
