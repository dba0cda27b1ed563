# SPDX-License-Identifier: Apache-2.0
"""Synthetic captions from a grammar: parquet with the columns of Recap-DataComp-1B, and lists of noun phrases.

For smoke runs and tests, only where a recipe asks for it by name (`data.source: synthetic`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from effsam3.errors import UserError
from effsam3.files import atomic_file, write_text

COLUMNS = {  # as published: name: Arrow type
    "url": "string",
    "re_caption": "string",
    "org_caption": "string",
    "sha256": "string",
    "key": "string",
    "re_clip_score": "double",
    "org_clip_score": "double",
    "re_length": "int64",  # words
    "org_length": "int64",
    "re_gpt4v_score": "int64",
    "org_gpt4v_score": "int64",
}
SHARD_ROWS = 2000
NO_ALT_TEXT = 0.01  # of the rows: the web has those, too

COLOURS = "red orange yellow green blue purple pink brown black white grey silver golden turquoise beige".split()
LOOKS = (
    "wooden metal plastic glass ceramic leather striped spotted shiny rusty old new small large tall round folded "
    "broken painted knitted inflatable vintage"
).split()
THINGS = (
    "bicycle|chair|table|lamp|dog|cat|horse|bird|boat|car|truck|bus|umbrella|backpack|suitcase|bottle|cup|bowl|plate|"
    "spoon|knife|laptop|keyboard|telephone|camera|clock|vase|plant|flower|tree|bench|ladder|bucket|kite|ball|skateboard|"
    "surfboard|guitar|piano|violin|drum|book|newspaper|pillow|blanket|sofa|bed|mirror|window|door|fence|bridge|tower|"
    "traffic light|fire hydrant|street sign|hot air balloon|coffee machine|wine glass|tennis racket|teddy bear|"
    "shopping cart|lawn mower|sewing machine|life jacket|rocking chair|picnic basket|apple|banana|carrot|cake|sandwich"
).split("|")
PEOPLE = (
    "woman|man|child|girl|boy|elderly couple|cyclist|fisherman|street vendor|chef|musician|construction worker|waiter"
).split("|")
PLACES = (
    "kitchen|living room|garden|park|train station|beach|market|workshop|library|parking lot|playground|forest|"
    "harbour|snowy field|city street|cafe|office|museum|stadium|farmyard|rooftop|balcony|classroom|airport hall"
).split("|")
RELATIONS = "next to|on top of|behind|in front of|under|leaning against|beside|far behind".split("|")
DOINGS = (
    "is holding|is looking at|is walking towards|is repairing|is carrying|is sitting beside|is pointing at|is cleaning"
).split("|")
LIGHTS = (
    "soft morning light|harsh midday sun|the glow of street lamps|an overcast sky|warm evening light|neon light|"
    "light from a single window|deep shade"
).split("|")
MOODS = "calm busy cheerful quiet tidy cluttered nostalgic festive".split()
NUMBERS = ["two", "three", "four", "five", "six", "several", "a dozen"]
OPENINGS = (
    "The image shows|The image features|This photograph captures|In this image there is|The picture presents|"
    "At the centre of the image is"
).split("|")
NOISE = [
    *3 * [""],
    " - stock photo",
    " | free shipping",
    " (1)",
    " HD wallpaper",
    " by owner",
    "!!",
    " &amp; more",
    "...",
]


def make_synthetic_recap(folder: str | Path, rows: int, seed: int = 0) -> None:
    """Write `rows` captions as `train-*.parquet` into `folder`: long `re_caption`, short noisy `org_caption`.

    A row depends on (seed, its number) only. Files that are there are kept; another seed or number is for
    `files.stamp` to refuse.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    shards = -(-rows // SHARD_ROWS)
    for shard in range(shards):
        file = folder / f"train-{shard:05d}-of-{shards:05d}.parquet"
        if not file.is_file():
            numbers = range(shard * SHARD_ROWS, min(rows, (shard + 1) * SHARD_ROWS))
            table = pyarrow.Table.from_pylist([make_row(number, seed) for number in numbers], schema)
            with atomic_file(file) as partial:
                parquet.write_table(table, partial)


def make_synthetic_phrases(path: str | Path, count: int, seed: int = 0) -> None:
    """Write `count` different noun phrases, one per line, into a .txt; a file that is there is kept.

    Raises UserError when the grammar does not have that many.
    """
    path = Path(path)
    if path.is_file():
        return
    most = len(THINGS) * len(COLOURS) * len(LOOKS)  # about a third of what the grammar has
    if count > most:
        raise UserError(f"{count} synthetic phrases asked for; the grammar is good for {most}")
    rng = np.random.default_rng([seed, 1])
    phrases: dict[str, None] = {}  # in the order drawn, each once
    while len(phrases) < count:
        phrases[_phrase(rng)] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{phrase}\n" for phrase in phrases))


def make_row(number: int, seed: int) -> dict:
    """Return one row, keys as COLUMNS."""
    rng = np.random.default_rng([seed, 0, number])
    thing, place = _phrase(rng), _pick(rng, PLACES)
    long, short = _long(rng, thing, place), _alt_text(rng, thing, place)
    url = f"https://example.com/{seed}/{number}.jpg"
    return {
        "url": url,
        "re_caption": long,
        "org_caption": short,
        "sha256": hashlib.sha256(url.encode()).hexdigest(),
        "key": f"{number:012d}",
        "re_clip_score": round(float(rng.normal(0.32, 0.05)), 6),
        "org_clip_score": round(float(rng.normal(0.28, 0.07)), 6),
        "re_length": len(long.split()),
        "org_length": len(short.split()),
        "re_gpt4v_score": int(rng.integers(3, 6)),
        "org_gpt4v_score": int(rng.integers(1, 6)),
    }


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[rng.integers(len(words))]


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _phrase(rng: np.random.Generator) -> str:
    """Return a noun phrase of one to eight words, without an article."""
    thing = _pick(rng, THINGS)
    kind = rng.integers(6)
    if kind == 1:
        return f"{_pick(rng, COLOURS)} {thing}"
    if kind == 2:
        return f"{_pick(rng, LOOKS)} {thing}"
    if kind == 3:
        return f"{_pick(rng, LOOKS)} {_pick(rng, COLOURS)} {thing}"
    if kind == 4:
        return f"{thing} {_pick(rng, RELATIONS)} the {_pick(rng, THINGS)}"
    if kind == 5:
        return f"{_pick(rng, PEOPLE)} with {_a(_pick(rng, COLOURS))} {thing}"
    return thing


def _long(rng: np.random.Generator, thing: str, place: str) -> str:
    sentences = [f"{_pick(rng, OPENINGS)} {_a(thing)} in {_a(place)}."]
    more = [
        f"{_a(_pick(rng, PEOPLE)).capitalize()} {_pick(rng, DOINGS)} it, dressed in {_pick(rng, COLOURS)}.",
        f"{_pick(rng, RELATIONS).capitalize()} it there is {_a(_phrase(rng))}.",
        f"In the background {_pick(rng, NUMBERS)} {_pick(rng, COLOURS)} objects can be seen, among them "
        f"{_a(_pick(rng, THINGS))} and {_a(_pick(rng, THINGS))}.",
        f"The scene lies in {_pick(rng, LIGHTS)}, which gives it {_a(_pick(rng, MOODS))} mood.",
        f'A sign reads "{_pick(rng, PLACES).upper()} {rng.integers(1, 100)}" in {_pick(rng, COLOURS)} letters.',
        f"The floor is {_pick(rng, LOOKS)} and the walls are {_pick(rng, COLOURS)}.",
    ]
    chosen = rng.permutation(len(more))[: rng.integers(2, 6)]
    return " ".join(sentences + [more[index] for index in chosen])


def _alt_text(rng: np.random.Generator, thing: str, place: str) -> str:
    if rng.random() < NO_ALT_TEXT:
        return ""
    kind = rng.integers(4)
    if kind == 0:
        text = f"IMG_{rng.integers(10000):04d} {thing}"
    elif kind == 1:
        text = f"{thing.title()}, {place.title()} {rng.integers(1990, 2024)}"
    elif kind == 2:
        text = f"{thing} {_pick(rng, COLOURS)} {_pick(rng, LOOKS)}"
    else:
        text = f"{_a(thing)} in the {place}"
    return text + _pick(rng, NOISE)
