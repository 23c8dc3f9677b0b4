"""The order of training: every sample once per epoch, whatever the workers, and the same after a stop."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from mal.data.sampler import OffsetSampler, epoch_order, steps_left, worker_part

LENGTHS = st.integers(1, 200)
BATCHES = st.integers(1, 9)
WORKERS = st.integers(1, 6)


def _global(length: int, batch: int, workers: int, offset: int = 0) -> list[list[int]]:
    """The batches of each worker: ``[worker][sample]``."""
    order = epoch_order(length, 7, 3)
    return [
        worker_part(order, offset=offset, batch_size=batch, rank=r, workers=workers).tolist() for r in range(workers)
    ]


def _in_turn(parts: list[list[int]]) -> list[int]:
    """The samples of all workers in the global order."""
    return [index for step in zip(*parts, strict=True) for index in step]


@given(LENGTHS, BATCHES, WORKERS)
def test_every_sample_once_then_the_start_again(length: int, batch: int, workers: int) -> None:
    parts = _global(length, batch, workers)
    assert {len(part) for part in parts} == {steps_left(length, 0, batch, workers) * batch}
    samples = _in_turn(parts)
    assert sorted(samples[:length]) == list(range(length))
    assert samples == [samples[k % length] for k in range(len(samples))]
    assert len(samples) - length < batch * workers


@given(LENGTHS, BATCHES, WORKERS)
def test_parts_are_disjoint_but_for_the_filling(length: int, batch: int, workers: int) -> None:
    counts = np.bincount(_in_turn(_global(length, batch, workers)), minlength=length)
    assert counts.min() >= 1
    assert (counts - 1).sum() < batch * workers


@given(LENGTHS, BATCHES, WORKERS, st.data())
def test_resuming_goes_on_as_if_nothing_had_happened(
    length: int, batch: int, workers: int, data: st.DataObject
) -> None:
    undisturbed = _global(length, batch, workers)
    done = data.draw(st.integers(0, steps_left(length, 0, batch, workers)))
    resumed = _global(length, batch, workers, offset=done * batch * workers)
    assert resumed == [part[done * batch :] for part in undisturbed]


@given(LENGTHS, BATCHES, WORKERS, BATCHES, WORKERS, st.data())
def test_other_workers_take_exactly_the_rest(
    length: int, batch: int, workers: int, new_batch: int, new_workers: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, steps_left(length, 0, batch, workers) - 1)) * batch * workers
    before = _in_turn(_global(length, batch, workers))[:done]
    after = _in_turn(_global(length, new_batch, new_workers, offset=done))
    assert sorted(before + after[: length - done]) == list(range(length))
    assert len(after) - (length - done) < new_batch * new_workers


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    state = pickle.dumps(np.random.get_state())
    epoch_order(50, 1, 2)
    assert state == pickle.dumps(np.random.get_state())


def test_nothing_is_left_of_a_finished_epoch_or_of_no_data() -> None:
    assert [len(p) for p in _global(10, 4, 2, offset=16)] == [0, 0]
    assert worker_part(epoch_order(0, 1, 1), offset=0, batch_size=4, rank=0, workers=1).tolist() == []


class _Keys(Dataset[list[int]]):
    def __getitem__(self, key: tuple[int, int]) -> list[int]:
        return list(key)


def test_a_loader_reads_full_batches_and_moves_with_the_position() -> None:
    sampler = OffsetSampler(10, batch_size=3, rank=1, workers=2, seed=4)
    loader = DataLoader(_Keys(), batch_size=3, sampler=sampler)
    for epoch, offset, batches in ((0, 0, 2), (1, 0, 2), (1, 6, 1), (2, 12, 0)):
        sampler.set_position(epoch, offset)
        read = [[key.tolist() for key in batch] for batch in loader]
        assert len(read) == len(loader) == batches
        part = worker_part(epoch_order(10, 4, epoch), offset=offset, batch_size=3, rank=1, workers=2)
        assert [index for batch in read for index in batch[1]] == part.tolist()
        assert {e for batch in read for e in batch[0]} <= {epoch}
