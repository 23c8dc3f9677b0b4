"""The predictor's stages in threads: the same masks, the network never waiting, and what goes wrong comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from mal.boxes import Box
from mal.labelling.pipeline import AHEAD, ahead, predict_all
from mal.predictor import Answer, BoxItem, Crops, MaskResult, Predictor, pack

IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


class Brightness(nn.Module):
    def forward(self, images: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
        return images[:, 0, ::4, ::4] + 1


def _batches(count: int, size: int = 4) -> Iterator[tuple[int, list[BoxItem]]]:
    for number in range(count):
        yield number, [BoxItem(IMAGE, Box(k + number % 7, 2.5, 30.0 + k, 40.0)) for k in range(size)]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"more_margins": (1.0,)}])
def test_the_same_masks_in_the_same_order(options):
    predictor = Predictor(Brightness(), crop_size=32, **options)
    one_by_one = [(key, predictor.predict(items)) for key, items in _batches(9)]
    assert sum(result.area for _, results in one_by_one for result in results) > 1000
    for overlap in (False, True):
        assert list(predict_all(predictor, _batches(9), overlap=overlap)) == one_by_one


class SlowStages(Predictor):
    """Every stage sleeps, as if another device did it; notes when the network began and ended."""

    def __init__(self) -> None:
        super().__init__(Brightness(), crop_size=16)
        self.worked: list[tuple[float, float]] = []
        self.made = super().crops_of([BoxItem(IMAGE, Box(1, 1, 9, 9))])
        self.answered = super().answer(self.made)
        self.masked = super().masks_of(self.answered)

    def crops_of(self, items: Sequence[BoxItem]) -> Crops:
        time.sleep(0.1)
        return self.made

    def answer(self, crops: Crops) -> Answer:
        begun = time.perf_counter()
        time.sleep(0.2)
        self.worked.append((begun, time.perf_counter()))
        return self.answered

    def masks_of(self, answer: Answer) -> list[MaskResult]:
        time.sleep(0.1)
        return self.masked


def _busy(predictor: SlowStages, overlap: bool) -> float:
    """The network's share of the time between its first and its last batch."""
    predictor.worked.clear()
    assert len(list(predict_all(predictor, _batches(12), overlap=overlap))) == 12
    spans = predictor.worked
    return sum(end - begin for begin, end in spans) / (spans[-1][1] - spans[0][0])


def test_the_network_does_not_wait_for_crops_and_masks():
    predictor = SlowStages()
    assert _busy(predictor, overlap=True) >= 0.9
    assert _busy(predictor, overlap=False) < 0.7


class Small(Predictor):
    """A device with room for so many boxes in a stage."""

    room: dict[str, int]

    def _check(self, stage: str, boxes: int) -> None:
        if boxes > self.room.get(stage, 99):
            raise torch.OutOfMemoryError(stage)

    def crops_of(self, items: Sequence[BoxItem]) -> Crops:
        self._check("crops", len(items))
        return super().crops_of(items)

    def answer(self, crops: Crops) -> Answer:
        self._check("answer", len(crops.batches[0].placements))
        return super().answer(crops)

    def masks_of(self, answer: Answer) -> list[MaskResult]:
        self._check("masks", len(answer.crops.batches[0].placements))
        return super().masks_of(answer)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stage", ["crops", "answer", "masks"])
def test_a_batch_too_large_for_the_device_goes_through_in_parts(stage, overlap):
    predictor = Small(Brightness(), crop_size=32, more_margins=(1.0,))
    predictor.room = {}
    whole = list(predict_all(predictor, _batches(3, size=7), overlap=overlap))
    predictor.room = {stage: 2}
    assert list(predict_all(predictor, _batches(3, size=7), overlap=overlap)) == whole
    predictor.room = {stage: 0}
    with pytest.raises(torch.OutOfMemoryError, match=stage):
        list(predict_all(predictor, _batches(3, size=7), overlap=overlap))


def _failing(after: int) -> Iterator[tuple[int, list[BoxItem]]]:
    yield from _batches(after)
    raise ZeroDivisionError("no such image")


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_stage_raises_comes_out_and_no_thread_is_left(overlap):
    before = threading.active_count()
    predictor = Predictor(Brightness(), crop_size=32)
    with pytest.raises(ZeroDivisionError, match="no such image"):
        list(predict_all(predictor, _failing(5), overlap=overlap))
    assert threading.active_count() == before


def test_what_is_done_ahead_is_bounded_and_stops_with_who_asks():
    made = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = ahead(source(), AHEAD)
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 1 + AHEAD + 1
    items.close()
    at_the_end = len(made)
    time.sleep(0.2)
    assert len(made) == at_the_end


def test_windows_are_packed_for_one_transfer():
    windows = [IMAGE[3:20, 5:9], IMAGE[:1, :1], IMAGE]
    parts = pack(windows, pinned=False).split([window.size for window in windows])
    for window, part in zip(windows, parts, strict=True):
        np.testing.assert_array_equal(part.view(window.shape).numpy(), window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_of_a_device_give_the_same_masks_as_one():
    predictor = Predictor(Brightness(), crop_size=32, device="cuda", flip=True)
    one_by_one = [(key, predictor.predict(items)) for key, items in _batches(40)]
    assert list(predict_all(predictor, _batches(40), overlap=True)) == one_by_one
