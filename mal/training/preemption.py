"""What tells training to stop before it is done: SIGTERM to the driver or a worker, a pause, a node that is drained.

Every rank has its own wish; `Agreement` makes one of them, every other second, so that all save at the same step.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mal.run import pause

AGREE_SECONDS = 2.0
"""Ranks agree this often, and share their losses then."""
_MOST_STEPS = 64


class Wish(enum.IntEnum):
    """What is to be done after a step. The highest that any rank has is done by all."""

    GO_ON = 0
    SAVE = 1
    """Save and go on: a node will be taken away."""
    LEAVE = 2
    """Save and leave: a worker was told to end. Ray starts the workers again."""
    PAUSE = 3
    """Save and end: the run was asked to pause, or its driver was told to end."""


class WorkerEndedError(RuntimeError):
    """A worker was told to end, and its work is saved. Not a MalError: starting workers again mends it."""


class Agreement:
    """All ranks of ``group`` (None: there is one) agree what to do, by a message on the CPU: no GPU is waited for."""

    def __init__(self, group: Any, rank: int) -> None:
        self._group, self._rank = group, rank
        self._steps, self._left, self._since = 1, 1, time.monotonic()

    def reach(self, wish: Callable[[], Wish]) -> Wish | None:
        """The common wish; None if it is not yet time to ask for it again. Called after every step, by all ranks."""
        self._left -= 1
        if self._left:
            return None
        seconds = (time.monotonic() - self._since) / self._steps
        steps = max(1, min(_MOST_STEPS, round(AGREE_SECONDS / max(seconds, 1e-6))))
        # The first rank's clock says when to ask again.
        common = torch.tensor([int(wish()), steps if self._rank == 0 else 0])
        if self._group is not None:
            dist.all_reduce(common, op=dist.ReduceOp.MAX, group=self._group)
        self._steps = self._left = int(common[1])
        self._since = time.monotonic()
        return Wish(int(common[0]))


class Notice:
    """What this worker knows of an end that comes."""

    def __init__(self, folder: str, rank: int, drains: Callable[[], Any] = lambda: None) -> None:
        """``drains``: Ray's notice of nodes that are taken away, or None; called by all ranks alike."""
        self._folder, self._rank, self._drains = folder, rank, drains
        self._saved_for: set[str] = set()

    def wish(self) -> Wish:
        """This rank's. The first one looks for a request to pause, every one for its own SIGTERM and for drains."""
        drained = self._drains()
        if self._rank == 0 and pause.asked(self._folder):
            return Wish.PAUSE
        if _TOLD.is_set():
            return Wish.LEAVE
        nodes = set(drained.preempted_node_to_ranks) if drained is not None else set()
        fresh = nodes - self._saved_for
        self._saved_for |= nodes
        return Wish.SAVE if fresh else Wish.GO_ON


_TOLD = threading.Event()
_TRAINS = threading.Event()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Inside, a SIGTERM to this process does not end it, but is a wish to `LEAVE`."""
    _TOLD.clear()
    _TRAINS.set()
    try:
        yield
    finally:
        _TRAINS.clear()


def hear_sigterm() -> None:
    """From now on the first SIGTERM is noted while training goes on; any other does what it did before."""
    before: Any = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _TRAINS.is_set() and not _TOLD.is_set():
            _TOLD.set()
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, note)


@contextlib.contextmanager
def sigterm_pauses(folder: str) -> Iterator[None]:
    """Inside, a SIGTERM to this process asks the run in ``folder`` to pause; a second one interrupts it.

    Not in a job: there SIGTERM is how a job is cancelled, and Ray kills it three seconds later. Not in a thread.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if os.environ.get(pause.ATTEMPT_VARIABLE) or not in_main:
        yield
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        pause.ask(folder)
        print("told to end (SIGTERM): training saves its state first", flush=True)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
