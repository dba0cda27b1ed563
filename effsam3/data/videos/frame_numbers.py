# SPDX-License-Identifier: Apache-2.0
"""The number of a frame from the name of its file, where tools put much else into names.

| names | numbers |
|---|---|
| `00012`, `frame_000012`, `cam3_12_1080p` | the one that differs |
| `walk_mp4-0012_jpg.rf.6f5902ac237024bdd0c176cb93063dc4` (Roboflow) | the same; a hash holds no numbers |
| `shot2_0012_t0400` | the one that counts most closely, if all that count give one order |
| `20261128_122007_300` (a clock) | the place in natural order, from 0: none of its numbers counts on its own |

Names with two readings that give two orders are refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

# Digits in a hash count nothing, those of a date or a clock order frames without counting them.
HASH = re.compile(r"(?i)(?=[0-9]*[a-f])[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DECIMAL = re.compile(r"([0-9]+)\.([0-9]+)")
DATE, HOURS, SIXTY = r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])", r"([01]\d|2[0-3])", r"[0-5]\d"
CLOCK = re.compile(rf"\d*{DATE}({HOURS}({SIXTY})?)?|\d*{HOURS}{SIXTY}{SIXTY}|1\d{{9}}")  # the last: seconds since 1970


class UnclearNames(ValueError):
    """Says of two names why it is not clear which frame each is."""


def number_names(names: Sequence[str]) -> dict[str, int]:
    """Return {name: number} in ascending order; names come without their endings, each once.

    Raises:
        UnclearNames: a name without a number, two of one number, or two readings that give two orders.
    """
    names = sorted(names)
    parts = [re.split(r"([0-9]+)", HASH.sub("#", name)) for name in names]  # text, digits, text, ..., text
    columns = _shared_columns(parts)
    if not columns:
        bare = next((name for name, part in zip(names, parts, strict=True) if len(part) == 1), None)
        both = f"{names[0]} and {names[-1]} have no number in the same place"
        raise UnclearNames(both if bare is None else f"{bare} has no number")
    numbers = [list(map(int, column)) for column in columns]
    # A single frame has no order to get wrong.
    if len(names) == 1:
        return {names[0]: numbers[-1][0]}
    distinct = [place for place, column in enumerate(numbers) if len(set(column)) == len(names)]
    counting = [place for place in distinct if stride(sorted(numbers[place])) is not None]
    if len({tuple(part[::2]) for part in parts}) == 1:
        natural = list(zip(*numbers, strict=True))
        for (key, one), (same, other) in itertools.pairwise(sorted(zip(natural, names, strict=True))):
            if key == same:
                raise UnclearNames(f"{one} and {other} both are frame {key[-1]}; keep one of them")
        readings: list[list] = [natural, *(numbers[place] for place in counting if not _is_clock(columns, place))]
        if (decimals := _decimals(names)) is not None:
            readings.append(decimals)
    else:
        readings = [numbers[place] for place in counting or distinct]
        if not readings:
            raise UnclearNames(f"{names[0]} and {names[1]} differ in more than one number, and none of them counts")
    orders = [sorted(range(len(names)), key=reading.__getitem__) for reading in readings]
    for reading, order in zip(readings[1:], orders[1:], strict=True):
        if order != orders[0]:
            raise UnclearNames(_disagreement(names, orders[0], readings[0], reading))
    close = [numbers[place] for place in distinct if _follows(numbers[place], orders[0])]
    chosen = min(close, key=lambda column: max(column) - min(column), default=None)
    return {names[at]: rank if chosen is None else chosen[at] for rank, at in enumerate(orders[0])}


def stride(numbers: Sequence[int]) -> int | None:
    """Return the smallest step of ascending numbers if at least half of the steps are it and the others multiples.

    Other numbers, such as times or a choice of frames, do not count by a stride.
    """
    steps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
    smallest = min(steps, default=1)
    return None if 2 * steps.count(smallest) < len(steps) or any(step % smallest for step in steps) else smallest


def missing_numbers(numbers: Sequence[int]) -> Iterator[int]:
    """Yield the numbers that are lost from ascending ones of a constant stride."""
    step = stride(numbers)
    if step is not None:
        for number, after in itertools.pairwise(numbers):
            yield from range(number + step, after, step)


def match_names(names: Sequence[str], frames: Mapping[str, int]) -> dict[str, int]:
    """Return {name: number} of files that belong to frames, such as masks: by the frames' names, else by their own.

    Args:
        frames: {name: number} of the frames.

    Raises:
        UnclearNames: as `number_names`.
    """
    if all(name in frames for name in names):
        return {name: frames[name] for name in sorted(names, key=frames.__getitem__)}
    return number_names(names)


def _shared_columns(parts: list[list[str]]) -> list[list[str]]:
    """Return the digits of all names, place by place, as far as the texts around them are the same in all names."""
    count = min(len(part) // 2 for part in parts)
    left = _same([part[2 * place] for part in parts] for place in range(count))
    right = _same([part[-1 - 2 * place] for part in parts] for place in range(count - left))
    return [[part[2 * place + 1] for part in parts] for place in range(left)] + [
        [part[-2 - 2 * place] for part in parts] for place in reversed(range(right))
    ]


def _same(texts) -> int:
    """Count the first lists of which all entries are equal."""
    return sum(1 for _ in itertools.takewhile(lambda some: len(set(some)) == 1, texts))


def _is_clock(columns: list[list[str]], place: int) -> bool:
    """Say whether the digits up to a column, or those before it, are a date or a time of day in all names."""
    before = ["".join(digits) for digits in zip(*columns[:place], strict=True)] if place else [""] * len(columns[0])
    through = [start + digits for start, digits in zip(before, columns[place], strict=True)]
    return any(all(CLOCK.fullmatch(digits) for digits in some) for some in (before, through))


def _decimals(names: list[str]) -> list[float] | None:
    """Return the only decimal number of each name, if its digits behind the point vary in count and end in no zero."""
    found = [DECIMAL.findall(name) for name in names]
    behind = {pair[1] for pairs in found for pair in pairs}
    if any(len(pairs) != 1 for pairs in found) or len(set(map(len, behind))) == 1:
        return None
    if any(digits.endswith("0") and digits != "0" for digits in behind):  # 9, 10, 11: a count behind a point
        return None
    return [float(".".join(pairs[0])) for pairs in found]


def _follows(column: list[int], order: list[int]) -> bool:
    return all(column[one] < column[other] for one, other in itertools.pairwise(order))


def _disagreement(names: list[str], order: list[int], reading: list, other: list) -> str:
    """Say of two names that follow each other in one reading how the other one turns them round."""
    first, second = next((a, b) for a, b in itertools.pairwise(order) if other[a] > other[b])
    return (
        f"{names[first]} comes before {names[second]} by {reading[first]} < {reading[second]}, but after it by "
        f"{other[first]} > {other[second]}"
    )
