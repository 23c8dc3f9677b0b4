"""The order of training: a function of seed, epoch and how many samples have gone before, and of nothing else.

A *global offset* counts the samples of an epoch that all workers together have taken. Training that stopped at one
goes on from it with the same samples in the same order, also with another number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``0..length``; ``seed`` and ``epoch`` from 0 on."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def steps_left(length: int, offset: int, batch_size: int, workers: int) -> int:
    """Batches that every worker still has to do in an epoch of which ``offset`` samples are done."""
    return -(-max(length - offset, 0) // (batch_size * workers))


def worker_part(
    order: NDArray[np.int64], *, offset: int, batch_size: int, rank: int, workers: int
) -> NDArray[np.int64]:
    """What worker ``rank`` of ``workers`` takes of the rest of an epoch: every ``workers``-th sample.

    The rest is filled up from the epoch's start so that every worker has the same number of full batches. After k
    batches of each worker the global offset is ``offset + k * batch_size * workers``.

    Args:
        order: of the whole epoch, `epoch_order`.
        offset: global offset, from 0 on; beyond the end nothing is left.

    Returns:
        ``[steps_left * batch_size]`` indices.
    """
    assert 0 <= rank < workers, f"rank {rank} of {workers} workers"
    assert offset >= 0, f"offset {offset}"
    steps = steps_left(len(order), offset, batch_size, workers)
    places = np.arange(offset + rank, offset + steps * batch_size * workers, workers)
    return order[places % max(len(order), 1)]


class OffsetSampler(Sampler[tuple[int, int]]):
    """Yields the keys ``(epoch, index)`` of one worker's samples, from a global offset to the epoch's end.

    The epoch is part of the key because processes that load data outlive an epoch.
    """

    def __init__(
        self, length: int, *, batch_size: int, rank: int, workers: int, seed: int, epoch: int = 0, offset: int = 0
    ) -> None:
        """``length``: of the data set. ``batch_size``: per worker and step, whatever is taken in at once included."""
        self._length = length
        self._batch_size = batch_size
        self._rank = rank
        self._workers = workers
        self._seed = seed
        self._epoch = epoch
        self._offset = offset

    def set_position(self, epoch: int, offset: int = 0) -> None:
        """Where the next iteration begins. ``offset``: samples of ``epoch`` that all workers together have taken."""
        self._epoch, self._offset = epoch, offset

    def __len__(self) -> int:
        """Samples of this worker from the position on: a multiple of the batch size."""
        return steps_left(self._length, self._offset, self._batch_size, self._workers) * self._batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        part = worker_part(
            epoch_order(self._length, self._seed, self._epoch),
            offset=self._offset,
            batch_size=self._batch_size,
            rank=self._rank,
            workers=self._workers,
        )
        epoch = self._epoch
        return ((epoch, int(index)) for index in part)
