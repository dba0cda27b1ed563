# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees: a pure function of (seed, step), drawn before anything is divided among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

PADDING = -1  # a place in a batch that holds no sample
KEPT = 1 << 24  # samples of the longest order that is kept, in 64 MiB; a longer one is computed place by place
ROUNDS = 6  # of the permutation that is computed; 4 make one that nobody tells from chance (Luby and Rackoff 1988)


class StepSampler:
    """Yields one rank's micro-batches of dataset positions, from any step on.

    Step k takes positions k*G to (k+1)*G of an endless sequence of epochs, each a permutation by (seed, epoch), where
    G is the global batch. Micro-batch m of rank r is the slice m*world + r, so any world size and accumulation sees
    the same samples in the same step. The permutation is NumPy's up to KEPT samples, and `permuted` beyond.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        arrange: Callable[[np.ndarray], np.ndarray] | None = None,
        numbered: bool = False,
    ):
        """`arrange` may reorder a step's positions before they are divided, such as by length. `numbered` pairs every
        position with its place in the endless sequence, which seeds whatever is drawn at random for it."""
        # Otherwise ranks would take different numbers of micro-batches, and collectives would never meet.
        assert global_batch % (micro_batch * world) == 0
        self.arrange, self.numbered = arrange, numbered
        self.size, self.seed = size, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world = rank, world
        self._epoch, self._order = -1, np.empty(0, np.uint32)

    def positions(self, step: int) -> np.ndarray:
        """Return the global batch of a step: int64 (G,)."""
        # Epochs follow each other without a gap, so a batch may span two; no sample is dropped at an epoch's end.
        first = step * self.global_batch
        epochs_G, places_G = np.divmod(np.arange(first, first + self.global_batch), self.size)
        return np.concatenate([self._ordered(epoch, places_G[epochs_G == epoch]) for epoch in np.unique(epochs_G)])

    def micro_batches(self, start: int, stop: int) -> Iterator[list]:
        """Yield this rank's micro-batches of the steps `start` to `stop` (exclusive), in order: lists of positions,
        or of (position, number) if numbered."""
        for step in range(start, stop):
            positions = self.positions(step)
            if self.arrange is not None:
                # Within the step only: arranging may move samples between ranks, never between steps.
                positions = self.arrange(positions)
            # The ranks' slices interleave, so that accumulating more on fewer ranks visits the same samples.
            micros = positions.reshape(-1, self.world, self.micro_batch)
            # Numbered by place, not by sample: the second epoch draws other crops or clips of the same sample.
            numbers = (step * self.global_batch + np.arange(self.global_batch)).reshape(micros.shape)
            for micro, number in zip(micros[:, self.rank], numbers[:, self.rank], strict=True):
                yield list(zip(micro.tolist(), number.tolist(), strict=True)) if self.numbered else micro.tolist()

    def _ordered(self, epoch: int, places_N: np.ndarray) -> np.ndarray:
        """Return what is at some places of an epoch's order, int64."""
        draw = np.random.default_rng([self.seed, epoch])
        if self.size > KEPT:
            return permuted(places_N, self.size, draw.integers(2**64, size=ROUNDS, dtype=np.uint64))
        if epoch != self._epoch:
            self._epoch = epoch
            # Only one epoch is kept: steps ask in order, and eleven million positions take long to shuffle.
            self._order = np.arange(self.size, dtype=np.uint32)
            draw.shuffle(self._order)  # draws what `permutation` does, in half the memory
        return self._order[places_N].astype(np.int64)


def permuted(places_N: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return what a permutation of `size` numbers puts at these places, int64, without holding it.

    A Feistel network permutes the numbers of an even count of bits; where it leads beyond `size` it is applied again,
    until it leads back (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        keys: uint64, one a round; others are another permutation.
    """
    half = np.uint64(-(-max(size - 1, 1).bit_length() // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found_N = places_N.astype(np.uint64)
    outside = np.arange(len(found_N))
    while len(outside):
        left, right = found_N[outside] >> half, found_N[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found_N[outside] = left << half | right
        outside = outside[found_N[outside] >= size]
    return found_N.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return uint64 whose bits all depend on all of the values' (Stafford's Mix13, as in SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def sequential_batches(size: int, batch: int, rank: int, world: int) -> list[list[int]]:
    """Divide 0..size-1 among ranks in equally many full batches; what is left over is `PADDING`.

    Equally many, because under ZeRO-3 every rank must take part in every forward.
    """
    batches = -(-size // (batch * world))
    padded = np.full(batches * world * batch, PADDING)
    padded[:size] = np.arange(size)
    return padded.reshape(batches, world, batch)[:, rank].tolist()
