# SPDX-License-Identifier: Apache-2.0
"""SAM 3's tokenizer: CLIP's lower-case byte-pair encoding, its cleaning of text included, fast enough to run online.

The ids are those of open_clip's SimpleTokenizer, which are those of SAM 3's own. Padding is that of transformers'
SAM 3 processors: id `PAD_ID` and a mask. The pad id is also the end token's, so only the mask tells them apart.

Letters: B texts, L tokens of the longest.
"""

from __future__ import annotations

import gzip
import html
import re
from importlib.util import find_spec
from pathlib import Path

import ftfy
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

START_ID = 49406
END_ID = 49407
PAD_ID = END_ID  # transformers pads SAM 3's prompts with the end token
# SAM 3's table of positions, and the length to which transformers' SAM 3 processors pad every prompt, always.
PROCESSOR_LENGTH = 32

# As in CLIP, with open_clip's names of the two special tokens: written out in a text, they are those tokens.
_SPECIAL = {"<start_of_text>": [START_ID], "<end_of_text>": [END_ID]}
_FIRST = "|".join(_SPECIAL) + "|'s|'t|'re|'ve|'m|'ll|'d|"
_words_of = regex.compile(_FIRST + r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE).findall
# The same on what `clean` leaves of ASCII, which is lower-case; Python's own engine is twice as fast.
_words_of_ascii = re.compile(_FIRST + r"[a-z]+|[0-9]|[^\sa-z0-9]+").findall
# Printable ASCII without `&`, and line breaks: what neither ftfy nor html.unescape would change but for line breaks,
# which are white space after as before.
_CLEAN = re.compile(r"[\t\n\r -%'-~]*")
_MAX_KNOWN_WORDS = 2**18  # about 60 MB


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read CLIP's vocabulary ({token: id}, 49,408) and its merges in order of rank from the file in open_clip."""
    # find_spec, not an import: open_clip itself takes seconds.
    folder = Path(find_spec("open_clip").submodule_search_locations[0])
    text = gzip.decompress((folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(_byte_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in the vocabulary, in the vocabulary's order."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def clip_tokenizer():
    """CLIP's tokenizer as a transformers one (context 32), which a chassis' processor holds."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROCESSOR_LENGTH)


def clean(text: str) -> str:
    """Mend the encoding, resolve HTML entities, make every white space one blank, lower the case."""
    if _CLEAN.fullmatch(text) is None:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class _KnownWords(dict):
    """{word: its ids}, filled by byte-pair encoding as words are met; forgets all when full."""

    def __init__(self):
        super().__init__(_SPECIAL)
        vocabulary, merges = clip_vocabulary()
        self.letters = _byte_letters()
        self.bpe = BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>")

    def __missing__(self, word: str) -> list[int]:
        letters = "".join(self.letters[byte] for byte in word.encode())
        ids = [token.id for token in self.bpe.tokenize(letters)]
        if len(self) >= _MAX_KNOWN_WORDS:
            self.clear()
            self.update(_SPECIAL)
        self[word] = ids
        return ids


class Tokenizer:
    """Texts to token ids. Words already met cost one look-up, so keep one tokenizer per process."""

    def __init__(self):
        self._known = _KnownWords()

    def tokenize(self, texts: list[str], context_length: int) -> list[list[int]]:
        """Return each text's ids, start and end token included, cut to `context_length`; the end token stays last."""
        known, most = self._known, context_length - 2
        rows = []
        for text in texts:
            text = clean(text)
            words = (_words_of_ascii if text.isascii() else _words_of)(text)
            rows.append([START_ID, *[index for word in words for index in known[word]][:most], END_ID])
        return rows

    def encode(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        """Return `pad(tokenize(texts, context_length))`."""
        return pad(self.tokenize(texts, context_length))


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) int64, padded with `PAD_ID` to the longest row, and the mask (B, L) bool, true on tokens."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids_BL = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    return ids_BL, torch.arange(longest) < torch.tensor(lengths)[:, None]
