"""How long the network of an actor waits for the images that it is to see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Waiting:
    """A stopwatch that runs while the next item of an iterator is waited for.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock = clock

    def over(self, source: Iterator[T]) -> Iterator[T]:
        """The items of ``source``."""
        while True:
            begun = self._clock()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.seconds += self._clock() - begun
            yield item
