# SPDX-License-Identifier: Apache-2.0
"""The tokenizer, against open_clip's reference and transformers' SAM 3 processor."""

import pickle
import random
import subprocess
import sys

import ftfy
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, whitespace_clean
from transformers import Sam3Processor, Sam3VideoProcessor

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.text import tokens
from effsam3.models.text.tokens import (
    END_ID,
    PAD_ID,
    PROCESSOR_LENGTH,
    START_ID,
    PromptTokenizer,
    TextTooLong,
    Tokenizer,
    clean,
    clip_vocabulary,
    pad,
)

PHRASES = ["a cat", "the person's red hat", "yellow school bus no. 42", "Two dogs, playing!", "isn't it?", "caf\u00e9"]
ODD = [
    "",
    " \t\r\n\x0b\x0c\x1c\x85\xa0\u2028\u3000",
    "!",
    "!!! a!b",
    "<start_of_text> x <END_OF_TEXT><|endoftext|>",
    "<\u017ftart_of_text> '\u017f it'\u017f",  # the long s is an s to a case-insensitive pattern
    "&amp;amp; &lt;b&gt; &#233; &#x1F600; &nbsp;| &amp;lt; &unknown; &#xD800; R&D &",
    "caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",  # UTF-8 read as Latin: ftfy mends it
    "e\u0301 \ufb01ne \uff21\uff22 \u201ccurly\u2019s\u201d \u2014 \u2026",
    "\u0130stanbul \u039f\u0394\u039f\u03a3 STRASSE \u1e9e \u212a",  # lower case of another length
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f600",
    "\u6f22\u5b57\u304b\u306a \ud55c\uae00 \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0662\u0663 \u00bd \u2167 \u00b2 12345",
    "a\x00b\x07c\x1b[31mred\x1b[0m\x7f \x85 \x93x\x94",
    "\ud83d\ude00 \ud800 lone",  # surrogates
    "\ufeffBOM \u200bzero\u200cwidth\u00adsoft",
    "a" * 3000,
    "word " * 3000,
    "\U0001f600" * 400,
    "http://example.org/?q=1&copy=2&lt=3",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def reference():
    return SimpleTokenizer(context_length=PROCESSOR_LENGTH)


def generated(count, seed):
    """Strings of words, entities, odd characters of every plane and every kind of white space."""
    rng = random.Random(seed)
    words = [token.removesuffix("</w>") for token in clip_vocabulary()[0]]
    planes = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x6FF), (0x900, 0x20FF), (0x2100, 0xFFFF), (0x10000, 0x1FFFF)]
    spaces = [" "] * 20 + ["  ", "\n", "\t", "\r\n", "\xa0", "\u2003", "\x0b", "\x1f"]
    entities = ["&amp;", "&quot;", "&#39;", "&eacute;", "&lt;br&gt;", "&amp;gt;", "&#128512;"]

    def piece():
        kind = rng.random()
        if kind < 0.6:
            word = rng.choice(words)
            return rng.choice([word, word.upper(), word.title(), word + rng.choice([",", ".", "'s", "!", "-"])])
        if kind < 0.7:
            return "".join(rng.choices("etaoinshrdlucm'", k=rng.randint(1, 25)))
        if kind < 0.8:
            return str(rng.randint(0, 10**6))
        if kind < 0.85:
            return rng.choice(entities)
        low, high = rng.choice(planes)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4)))

    return ["".join(piece() + rng.choice(spaces) for _ in range(rng.randint(1, 10))) for _ in range(count)]


def test_ids_are_the_reference_tokenizers(tokenizer, reference):
    # Token 0 is "!", the reference's pad id too: compare what it encodes before it pads.
    for text in [*PHRASES, *ODD, *generated(20_000, seed=0)]:
        wanted = [START_ID, *reference.encode(text), END_ID]
        assert tokenizer.tokenize([text], 10**6) == [wanted], ascii(text)


def test_every_character_of_the_first_planes(tokenizer, reference):
    characters = [chr(point) for point in range(0x3000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(characters), 8):
        text = "x".join(characters[start : start + 8])
        assert tokenizer.tokenize([text], 10**6)[0][1:-1] == reference.encode(text), ascii(text)


@pytest.mark.parametrize("context_length", [3, 16, 32, 77])
def test_truncation_is_the_reference_tokenizers(tokenizer, reference, context_length):
    texts = [text for text in [*PHRASES, *ODD, *generated(300, seed=1)] if "!" not in text]
    ids_BL, mask_BL = tokenizer.encode(texts, context_length)
    wanted_BL = reference(texts, context_length)
    assert ids_BL.shape == mask_BL.shape == (len(texts), min(context_length, 77))
    assert torch.equal(ids_BL[mask_BL], wanted_BL[mask_BL])
    # Where the reference pads with zeros, this pads with the end token, and the other way round nowhere.
    assert torch.equal(mask_BL, wanted_BL != 0) and (ids_BL[~mask_BL] == PAD_ID).all()
    assert (ids_BL[torch.arange(len(texts)), mask_BL.sum(1) - 1] == END_ID).all()


def test_ascii_that_skips_ftfy_would_pass_through_it_unchanged():
    printable = [chr(point) for point in range(0x20, 0x7F) if chr(point) != "&"]
    pairs = ["".join(a + b for b in printable) for a in printable]
    rng = random.Random(2)
    runs = ["".join(rng.choices([*printable, "\n", "\t", "\r"], k=40)) for _ in range(3000)]
    for text in [*printable, *pairs, *runs]:
        assert tokens._CLEAN.fullmatch(text)
        assert clean(text) == whitespace_clean(ftfy.fix_text(text)).lower(), ascii(text)
    assert not any(tokens._CLEAN.fullmatch(text) for text in ("a&b", "\x1b", "\x7f", "\x00", "\x0b", "caf\u00e9"))


def test_padded_as_transformers_sam3_processor_pads(tokenizer):
    processor = Sam3Processor.from_pretrained(chassis_folder("tiny"))
    for phrase in PHRASES:
        batch = processor(text=phrase, return_tensors="pt")
        ids_BL, mask_BL = tokenizer.encode([phrase, "x " * 40], PROCESSOR_LENGTH)
        assert torch.equal(batch["input_ids"], ids_BL[:1])
        assert torch.equal(batch["attention_mask"].bool(), mask_BL[:1])


TYPOGRAPHIC = [
    "a person\u2019s hat",
    "\u201cquoted\u201d sign",
    "Tom &amp; Jerry",
    "it&#39;s red",
    "\ufb01ne",
    "<|endoftext|>",
]


def prompts(reference, count, seed):
    """Texts that SAM 3 can read whole, and the reference's ids and mask of each, padded as SAM 3's processors pad."""
    texts = [*PHRASES, *TYPOGRAPHIC, *ODD, *generated(count, seed)]
    rows = [(text, [START_ID, *reference.encode(text), END_ID]) for text in texts]
    kept = [(text, row) for text, row in rows if len(row) <= PROCESSOR_LENGTH]
    assert len(kept) > count / 2
    for text, row in kept:
        missing = PROCESSOR_LENGTH - len(row)
        yield text, row + [PAD_ID] * missing, [1] * len(row) + [0] * missing


def test_prompts_of_images_and_videos_get_the_references_ids(reference):
    folder = chassis_folder("tiny")
    image, video = Sam3Processor.from_pretrained(folder), Sam3VideoProcessor.from_pretrained(folder)
    for text in TYPOGRAPHIC:  # what transformers' own tokenizer gives, and why it is replaced
        assert image.tokenizer(text)["input_ids"] != [START_ID, *reference.encode(text), END_ID]
    image.tokenizer = video.tokenizer = PromptTokenizer()
    for text, ids, mask in prompts(reference, 300, seed=3):
        batch = image(text=text, original_sizes=[[9, 9]], return_tensors="pt")
        assert batch["input_ids"].tolist() == [ids] and batch["attention_mask"].tolist() == [mask], ascii(text)
        session = video.init_video_session()
        video.add_text_prompt(session, [text, text, "a cat"])
        assert session.prompt_input_ids[0].tolist() == [ids], ascii(text)
        assert session.prompt_attention_masks[0].tolist() == [mask] and len(session.prompts) == 2 - (text == "a cat")
    batch = image.tokenizer(["a cat", "two dogs"], return_tensors="np")
    assert batch["input_ids"].shape == (2, PROCESSOR_LENGTH)


def test_a_prompt_that_is_too_long_is_named_with_its_true_count(tokenizer):
    text = "\u2019 &amp;" * 20
    for tokenize in (PromptTokenizer(), lambda text: tokenizer.tokenize_whole([text])):
        assert tokenize("word " * 30)
        with pytest.raises(TextTooLong, match=r"the text 'word word .* is 31 tokens long; SAM 3 reads 30: put it sho"):
            tokenize("word " * 31)
        with pytest.raises(TextTooLong, match="is 40 tokens long"):
            tokenize(text)


def test_counting_tokens_takes_neither_torch_nor_transformers():
    code = "from effsam3.models.text.tokens import Tokenizer; import sys; assert Tokenizer().tokenize_whole(['a cat'])"
    code += "; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_padded_to_the_longest_only(tokenizer):
    ids_BL, mask_BL = tokenizer.encode(["a cat", "two black cats", ""], 32)
    assert ids_BL.dtype == torch.int64 and mask_BL.dtype == torch.bool
    assert mask_BL.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert ids_BL[2].tolist() == [START_ID, END_ID, PAD_ID, PAD_ID, PAD_ID]
    assert [row.tolist() for row in pad([[5, 6], [7]])[0]] == [[5, 6], [7, PAD_ID]]


def test_words_are_forgotten_when_there_are_too_many(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_MAX_KNOWN_WORDS", 8)
    small = Tokenizer()
    texts = [*PHRASES, "<start_of_text>", *PHRASES]
    assert small.tokenize(texts, 32) == tokenizer.tokenize(texts, 32)
    assert len(small._known) <= 8


def test_goes_to_worker_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize(["unseen antidisestablishment", *PHRASES], 32) == tokenizer.tokenize(
        ["unseen antidisestablishment", *PHRASES], 32
    )
