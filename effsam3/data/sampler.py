# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees: a pure function of (seed, step), drawn before anything is divided among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

PADDING = -1  # a place in a batch that holds no sample


class StepSampler:
    """Yields one rank's micro-batches of dataset positions, from any step on.

    Step k takes positions k*G to (k+1)*G of an endless sequence of epochs, each a permutation by (seed, epoch), where
    G is the global batch. Micro-batch m of rank r is the slice m*world + r, so any world size and accumulation sees
    the same samples in the same step.
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
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def positions(self, step: int) -> np.ndarray:
        """Return the global batch of a step: int64 (G,)."""
        # Epochs follow each other without a gap, so a batch may span two; no sample is dropped at an epoch's end.
        first = step * self.global_batch
        sequence = np.arange(first, first + self.global_batch)
        return np.array([self._permutation(n // self.size)[n % self.size] for n in sequence.tolist()])

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

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            # Only one epoch is kept: steps ask in order, and eleven million positions take long to shuffle.
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._order


def sequential_batches(size: int, batch: int, rank: int, world: int) -> list[list[int]]:
    """Divide 0..size-1 among ranks in equally many full batches; what is left over is `PADDING`.

    Equally many, because under ZeRO-3 every rank must take part in every forward.
    """
    batches = -(-size // (batch * world))
    padded = np.full(batches * world * batch, PADDING)
    padded[:size] = np.arange(size)
    return padded.reshape(batches, world, batch)[:, rank].tolist()
