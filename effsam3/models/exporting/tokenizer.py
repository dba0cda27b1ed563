# SPDX-License-Identifier: Apache-2.0
"""SAM 3's tokenizer as one file that `tokenizers` reads, without this package and without PyTorch."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from effsam3.models.text.tokens import END_ID, PAD_ID, PROCESSOR_LENGTH, START_ID, WORDS, clip_vocabulary

END = "<|endoftext|>"


def portable_tokenizer() -> Tokenizer:
    """Return the tokenizer: `encode(text)` has `ids` and `attention_mask`, padded to what SAM 3 reads.

    The ids are those of `effsam3.models.text.tokens.Tokenizer` but for what that one repairs: HTML entities, broken
    encodings, ligatures. Longer texts are not cut.
    """
    vocabulary, merges = clip_vocabulary()
    tokenizer = Tokenizer(BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex("[\u2018\u2019]"), "'"),  # typographic quotes, as people's keyboards write them
            normalizers.Replace(Regex("[\u201c\u201d]"), '"'),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # What lies between words is left out.
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|startoftext|> $A {END}", special_tokens=[("<|startoftext|>", START_ID), (END, END_ID)]
    )
    tokenizer.enable_padding(length=PROCESSOR_LENGTH, pad_id=PAD_ID, pad_token=END)
    return tokenizer
