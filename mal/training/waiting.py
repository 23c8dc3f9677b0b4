"""How much of training's time passes in waiting for the loader: the figure that says whether it starves the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch


class Mark(NamedTuple):
    """A moment, and what had been waited for up to it; both in seconds."""

    time: float
    waited: float


class Waiting:
    """Counts the seconds in which the next batch is waited for.

    On a GPU the host runs ahead of it: where the GPU is still busy when a batch arrives, nothing was waited for.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._waited = 0.0

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of ``loader``. The start of its processes, at an epoch's first batch, counts as well."""
        begun = self._clock()
        for batch in loader:
            if not self._busy():
                self._waited += self._clock() - begun
            yield batch
            begun = self._clock()

    def mark(self) -> Mark:
        """Now: a moment to count from."""
        return Mark(self._clock(), self._waited)

    def share(self, since: Mark) -> float:
        """Part of the time since a moment that was waited, in 0..1."""
        now = self.mark()
        return (now.waited - since.waited) / max(now.time - since.time, 1e-9)

    def _busy(self) -> bool:
        return self._device.type == "cuda" and not torch.cuda.current_stream(self._device).query()
