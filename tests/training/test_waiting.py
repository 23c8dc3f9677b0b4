"""The share of training's time that passes in waiting for the loader."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mal.training.waiting import Waiting


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waiting_is_told_from_working() -> None:
    clock = _Clock()
    waiting = Waiting(torch.device("cpu"), clock)

    def loader() -> Iterator[int]:
        for number in range(4):
            clock.now += 1.0  # loading
            yield number

    begun = waiting.mark()
    for number in waiting.over(loader()):
        clock.now += 3.0  # a step
        if number == 1:
            middle = waiting.mark()
    assert waiting.share(begun) == pytest.approx(0.25)
    clock.now += 2.0  # validation
    assert waiting.share(middle) == pytest.approx(2 / 10)
    assert waiting.mark().waited == pytest.approx(4.0)


def test_while_a_gpu_is_busy_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    waiting = Waiting(torch.device("cuda"), clock)
    busy = iter([False, True, True])

    class Stream:
        def query(self) -> bool:
            return not next(busy)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())

    def loader() -> Iterator[int]:
        for number in range(3):
            clock.now += 1.0
            yield number

    begun = waiting.mark()
    assert list(waiting.over(loader())) == [0, 1, 2]
    assert waiting.share(begun) == pytest.approx(1 / 3)
