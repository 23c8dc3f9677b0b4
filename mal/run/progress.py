"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 30.0
_WINDOW_SECONDS = 60.0


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``; hours and minutes for longer ones."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Rate:
    """Units per second: mean since the start, and over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._recent: deque[tuple[float, float]] = deque([(self._start, 0.0)])
        self.done = 0.0

    def add(self, units: float) -> None:
        self.done += units
        now = self._clock()
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @property
    def mean(self) -> float:
        return self.done / max(self.seconds, 1e-9)

    @property
    def now(self) -> float:
        (then, before), (last, after) = self._recent[0], self._recent[-1]
        return (after - before) / (last - then) if last > then else 0.0


class ProgressLine:
    """Shows ``label: done/total unit, rate, time left, extra``; as a bar on a terminal, else a line every 30 s.

    Use as a context manager and call `advance`. The lines come whether it is called or not: a thread writes them, and
    ``on_line`` runs in it. The last state is always shown. ``describe`` gives what is shown behind the figures.
    """

    def __init__(
        self,
        label: str,
        total: float,
        unit: str,
        *,
        already: float = 0,
        stream: TextIO | None = None,
        every: float = LOG_SECONDS,
        on_line: Callable[[str], None] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.already = label, total, unit, already
        self.rate = Rate()
        self.extra = ""
        self._describe = describe or (lambda: self.extra)
        self._stream = stream or sys.stderr
        self._every, self._on_line = every, on_line
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self.failed: BaseException | None = None
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self._stream))
            self._task = self._bar.add_task(label, total=total, completed=int(already), text="")

    def text(self) -> str:
        """The state in one line."""
        done = self.already + self.rate.done
        parts = [f"{done:,.0f}/{self.total:,.0f} {self.unit}", f"{self.rate.now:.1f}/s (mean {self.rate.mean:.1f}/s)"]
        if self.rate.done and done < self.total:
            parts.append(f"{duration((self.total - done) / self.rate.mean)} left")
        return ", ".join([*parts, self._describe()]).removesuffix(", ")

    def advance(self, units: float, extra: str = "") -> None:
        """``units`` more are done; ``extra`` is shown behind the figures."""
        self.rate.add(units)
        self.extra = extra or self.extra
        if self._bar is not None:
            self._bar.update(self._task, completed=self.already + self.rate.done, text=self.text())
        if self.failed is not None:
            raise self.failed

    def _tick(self) -> None:
        try:
            while not self._over.wait(self._every):
                self._show()
        except BaseException as error:  # noqa: BLE001  a full disk, say: it stops the work, in its own thread
            self.failed = error

    def _print(self) -> None:
        if self._bar is None:
            print(f"{self.label}: {self.text()}", file=self._stream, flush=True)

    def _show(self) -> None:
        self._print()
        if self._on_line is not None:
            self._on_line(self.text())

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        try:
            if error is not None:
                self._print()  # and nothing is written that could fail as well
            elif self.failed is not None:
                raise self.failed
            else:
                self._show()
        finally:
            if self._bar is not None:
                self._bar.stop()
