# SPDX-License-Identifier: Apache-2.0
"""SAM 3's tokenizer: CLIP's lower-case byte-pair encoding, its cleaning of text included, fast enough to run online.

The ids are those of open_clip's SimpleTokenizer, which are those of SAM 3's own. transformers' CLIPTokenizer, which
its SAM 3 processors hold, does not clean: a typographic apostrophe or an HTML entity becomes other tokens, and more.
Padding is that of these processors: id `PAD_ID` and a mask. The pad id is also the end token's, so only the mask tells
them apart. torch and transformers are imported when they are needed: counting tokens takes neither.

Letters: B texts, L tokens of the longest.
"""

from __future__ import annotations

import gzip
import html
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy
import regex
from tokenizers.models import BPE

from effsam3.errors import UserError
from effsam3.models.registry import SAM3

if TYPE_CHECKING:
    from torch import Tensor

START_ID = 49406
END_ID = 49407
PAD_ID = END_ID  # transformers pads SAM 3's prompts with the end token
PROCESSOR_LENGTH = SAM3.context_length  # to which transformers' SAM 3 processors pad every prompt, always

# As in CLIP, with open_clip's names of the two special tokens: written out in a text, they are those tokens.
_SPECIAL = {"<start_of_text>": [START_ID], "<end_of_text>": [END_ID]}
_FIRST = "|".join(_SPECIAL) + "|'s|'t|'re|'ve|'m|'ll|'d|"
WORDS = _FIRST + r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of lower-case text
_words_of = regex.compile(WORDS, regex.IGNORECASE).findall
# The same on what `clean` leaves of ASCII, which is lower-case; Python's own engine is twice as fast.
_words_of_ascii = re.compile(_FIRST + r"[a-z]+|[0-9]|[^\sa-z0-9]+").findall
# Printable ASCII without `&`, and line breaks: what neither ftfy nor html.unescape would change but for line breaks,
# which are white space after as before.
_CLEAN = re.compile(r"[\t\n\r -%'-~]*")
_MAX_KNOWN_WORDS = 2**18  # about 60 MB


class TextTooLong(UserError):
    """A prompt of more tokens than SAM 3 reads."""


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read CLIP's vocabulary ({token: id}, 49,408) and its merges in order of rank from the file in open_clip."""
    # find_spec, not an import: open_clip itself takes seconds.
    spec: Any = find_spec("open_clip")  # asked for before anything has begun
    folder = Path(spec.submodule_search_locations[0])
    text = gzip.decompress((folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [(left, right) for left, right in map(str.split, text.split("\n")[1 : 49152 - 256 - 2 + 1])]
    letters = list(_byte_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_letters() -> dict[int, str]:
    """Return the letter that represents each byte in the vocabulary, in the vocabulary's order.

    The printable ones of Latin-1 represent themselves and come first, letters from U+0100 on for the others.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def clip_tokenizer():
    """CLIP's tokenizer as a transformers one (context 32), which a saved processor holds: see `PromptTokenizer`."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    pairs: Any = merges  # declared as texts
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=PROCESSOR_LENGTH)


def clean(text: str) -> str:
    """Repair the encoding, resolve HTML entities, make every white space one blank, lower the case."""
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
        # All at once: an order of use would cost every look-up, and common words are back in no time.
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

    def why_not(self, text: str) -> str:
        """Return why SAM 3 cannot read a prompt whole, "" if it can."""
        try:
            self.tokenize_whole([text])
        except TextTooLong as error:
            return str(error)
        return ""

    def tokenize_whole(self, texts: list[str], context_length: int = PROCESSOR_LENGTH) -> list[list[int]]:
        """Return each text's ids, start and end token included, of texts that need no cutting.

        Raises:
            TextTooLong: a text has more than `context_length`.
        """
        rows = self.tokenize(texts, sys.maxsize)
        for text, row in zip(texts, rows, strict=True):
            if len(row) > context_length:
                raise TextTooLong(
                    f"the text {text!r} is {len(row) - 2} tokens long; SAM 3 reads {context_length - 2}: put it "
                    "shorter"
                )
        return rows

    def encode(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        """Return `pad(tokenize(texts, context_length))`."""
        return pad(self.tokenize(texts, context_length))


class PromptTokenizer:
    """SAM 3's tokenizer in the place of a transformers processor's: `processor.tokenizer = PromptTokenizer()`.

    Images and videos prompted by texts then get the ids that SAM 3 gives them, always `PROCESSOR_LENGTH` of them. It
    cannot be saved: a processor is saved before.
    """

    def __init__(self):
        self._tokenizer = Tokenizer()

    def __call__(
        self,
        text: str | list[str],
        return_tensors: str | None = None,
        padding: str = "max_length",
        max_length: int = PROCESSOR_LENGTH,
    ):
        """Return transformers' BatchEncoding of `input_ids` and `attention_mask` (B, L), as its tokenizers do.

        Raises:
            TextTooLong: a text of more than `max_length` tokens.
        """
        from transformers import BatchEncoding

        assert padding == "max_length", padding
        texts = [text] if isinstance(text, str) else list(text)
        rows = self._tokenizer.tokenize_whole(texts, max_length)
        ids = [row + [PAD_ID] * (max_length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
        encoded = {"input_ids": ids, "attention_mask": mask}
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in encoded.items()})
        return BatchEncoding(encoded, tensor_type=return_tensors)


# Texts on which tokenizers have been seen to differ: apostrophes, entities, broken encodings, scripts, long words.
_PROBES = (
    "a dog",
    "the dog\u2019s ball, don't",
    "caf\u00c3\u00a9 &amp;amp; bar",
    "\u8857\u4e0a\u7684\u72d7 \U0001f436",
    "<start_of_text> 1,234.5 m\u00b2",
    "\u00dcBER  \n fluffy-tailed " + "antidisestablishmentarianism " * 20,
)


def tokenizer_fingerprint() -> str:
    """Return a digest of the ids of texts that tokenizers differ in, 16 hex digits: what a store was made with."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(repr(Tokenizer().tokenize(list(_PROBES), PROCESSOR_LENGTH)).encode())


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) int64, padded with `PAD_ID` to the longest row, and the mask (B, L) bool, true on tokens."""
    import torch

    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids_BL = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    return ids_BL, torch.arange(longest) < torch.tensor(lengths)[:, None]
