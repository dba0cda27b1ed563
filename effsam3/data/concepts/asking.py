# SPDX-License-Identifier: Apache-2.0
"""Which phrases an image is asked for in training: those that it shows, and negatives, hard ones among them.

A negative is a phrase that annotators have looked for and not found (SA-Co's own, COCO's and LVIS's categories) or,
where phrases are free (SA-Co, RefCOCO), one of another image. Nobody has looked for the latter, so none is taken that
says more or less than a phrase of the image: where there is a "dog", a "brown dog" may well be. Hard negatives are

- those that annotators of SA-Co and LVIS were asked for, which were chosen to be hard,
- categories of COCO of the same `supercategory` as one that is there,
- phrases of the data that differ in one word from one that is there: another colour, or another thing of that colour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effsam3.data.concepts.pairs import ConceptPair, Subset

Asked = tuple[str, ConceptPair | None]  # a phrase with its pair; None: it is not there
EMPTY_WORDS = {"", "a", "an", "the"}  # the first is what is left of "'s"
TRIES = 20  # for a phrase of another image that can be asked


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many phrases an image is asked for at once, which share is not there, and which share of that is hard."""

    phrases: int = 4
    negatives: float = 0.5
    hard: float = 0.5


@dataclass
class AskedImage:
    """An image, and what is known of it.

    Attributes:
        name: its file, as the annotations have it.
        present: pairs whose instances are all annotated, at least one.
        absent: phrases that were looked for and are not there.
        hard: those of them that are hard.
        other: phrases that may be there: nothing else is known of them.
        free: whether phrases of other images can be asked, too.
    """

    name: str
    size: tuple[int, int]
    subset: Subset
    present: list[ConceptPair]
    absent: list[str]
    hard: list[str]
    other: list[str]
    free: bool

    @property
    def asked(self) -> bool:
        """Whether there is anything to learn from it."""
        return bool(self.present or self.absent)


def words_of(phrase: str) -> frozenset[str]:
    """Return a phrase's words, without articles and what tells one from many."""
    return frozenset(word.rstrip("s") for word in re.findall(r"\w+", phrase.lower())) - EMPTY_WORDS


def in_one_word(phrase: str) -> list[tuple[str, ...]]:
    """Return keys that phrases share if they differ in one word, in the same place, of two or more."""
    words = phrase.lower().split()
    return [(*words[:place], "", *words[place + 1 :]) for place in range(len(words)) if len(words) > 1]


class Asking:
    """Draws the phrases of images.

    Args:
        images: all of a data set, whose phrases are negatives of each other.
        choice: how many, and of which kind.
    """

    def __init__(self, images: Sequence[AskedImage], choice: Choice):
        self.choice = choice
        self.shown = [image.present for image in images if image.present]  # where phrases of others are drawn from
        self.alike: dict[tuple[str, ...], list[str]] = {}
        vocabulary = {phrase for image in images if image.free for phrase in image.absent}
        vocabulary |= {pair.phrase for image in images if image.free for pair in image.present}
        for phrase in sorted(vocabulary):
            for key in in_one_word(phrase):
                self.alike.setdefault(key, []).append(phrase)

    def draw(self, image: AskedImage, rng: np.random.Generator) -> list[Asked]:
        """Return the phrases to ask, as many as chosen, each once; fewer where no more is known of the image.

        Where it has too few phrases of a kind, the other kind fills up.
        """
        most = self.choice.phrases
        absent = int(most * self.choice.negatives + rng.random())
        order = [image.present[place] for place in rng.permutation(len(image.present))]
        negatives = self._negatives(image, most - min(most - absent, len(order)), rng)
        found: list[Asked] = [(phrase, None) for phrase in negatives]
        return [*((pair.phrase, pair) for pair in order[: most - len(found)]), *found]

    def _negatives(self, image: AskedImage, count: int, rng: np.random.Generator) -> list[str]:
        present = [pair.phrase for pair in image.present]
        known = [words_of(phrase) for phrase in (*present, *image.other)]
        hard = [*image.hard, *(one for one in self._altered(present) if self._can_be_asked(image, one, known))]
        chosen: list[str] = []
        for _ in range(count):
            left = [phrase for phrase in hard if phrase not in chosen]
            found = left[rng.integers(len(left))] if left and rng.random() < self.choice.hard else None
            found = found or self._of_another(image, chosen, known, rng)
            if found is None and (left := [one for one in (*image.absent, *hard) if one not in chosen]):
                found = left[rng.integers(len(left))]
            if found is not None:
                chosen.append(found)
        return chosen

    def _altered(self, phrases: list[str]) -> list[str]:
        return sorted(
            {other for phrase in phrases for key in in_one_word(phrase) for other in self.alike.get(key, ())}
        )

    def _of_another(
        self, image: AskedImage, chosen: list[str], known: list[frozenset[str]], rng: np.random.Generator
    ) -> str | None:
        """Draw a phrase as often as images show it, so that it alone does not tell whether it is there."""
        for _ in range(TRIES if self.shown else 0):
            pairs = self.shown[rng.integers(len(self.shown))]
            phrase = pairs[rng.integers(len(pairs))].phrase
            if phrase not in chosen and self._can_be_asked(image, phrase, known):
                return phrase
        return None

    @staticmethod
    def _can_be_asked(image: AskedImage, phrase: str, known: list[frozenset[str]]) -> bool:
        if phrase in image.absent:
            return True
        words = words_of(phrase)
        return image.free and not any(words <= own or own <= words for own in known)
