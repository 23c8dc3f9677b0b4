"""The stages of the predictor in threads of their own: while the network works, the next crops are made, and the masks
of the batch before.

What is done ahead is bounded: `AHEAD` batches of crops wait for the network, as many answers for their masks.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from mal.labelling.waiting import Waiting
from mal.predictor import Answer, BoxItem, Crops, MaskResult, Predictor

T = TypeVar("T")

AHEAD = 2


def predict_all(
    predictor: Predictor,
    batches: Iterator[tuple[T, Sequence[BoxItem]]],
    *,
    overlap: bool,
    waiting: Waiting | None = None,
) -> Iterator[tuple[T, list[MaskResult]]]:
    """The masks of ``batches``, in their order; each is given as a key that comes back, and its items.

    A batch that is too large for the device's memory goes through in halves: their keys are the same, their results
    are joined.

    Args:
        batches: pulled in another thread if ``overlap``.
        overlap: do the three stages in three threads.
        waiting: measures how long the network waits for what it is to see.
    """
    waiting = waiting or Waiting()
    if not overlap:
        for key, items in waiting.over(batches):
            yield key, _in_parts(_crops(predictor, items), lambda crops: predictor.masks_of(predictor.answer(crops)))
        return
    prepared = ((key, _crops(predictor, items)) for key, items in batches)
    unfinished: deque[tuple[T, list[Future[list[MaskResult]]]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="masks") as finisher:
        for key, parts in waiting.over(ahead(prepared, AHEAD)):
            unfinished.append((key, _answered(predictor, parts, finisher)))
            while len(unfinished) > AHEAD or (unfinished and all(future.done() for future in unfinished[0][1])):
                done, futures = unfinished.popleft()
                yield done, [result for future in futures for result in future.result()]
        for done, futures in unfinished:
            yield done, [result for future in futures for result in future.result()]


def _crops(predictor: Predictor, items: Sequence[BoxItem]) -> list[Crops]:
    """The crops of a batch, in several parts if they do not fit on the device together."""
    try:
        return [predictor.crops_of(items)]
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    half = len(items) // 2
    return _crops(predictor, items[:half]) + _crops(predictor, items[half:])


def _in_parts(parts: Sequence[Crops], work: Callable[[Crops], list[MaskResult]]) -> list[MaskResult]:
    """``work`` of all parts; one that does not fit on the device is halved."""
    results = []
    for crops in parts:
        try:
            results += work(crops)
        except torch.OutOfMemoryError:
            if len(crops.batches[0].placements) == 1:
                raise
        else:
            continue
        results += _in_parts(crops.halves(), work)
    return results


def _answered(
    predictor: Predictor, parts: Sequence[Crops], finisher: ThreadPoolExecutor
) -> list[Future[list[MaskResult]]]:
    """The network's answers to the crops of a batch, each handed to the thread that makes masks of it."""
    futures = []
    for crops in parts:
        try:
            answer = predictor.answer(crops)
        except torch.OutOfMemoryError:
            if len(crops.batches[0].placements) == 1:
                raise
            answer = None
        if answer is None:
            futures += _answered(predictor, crops.halves(), finisher)
        else:
            futures.append(finisher.submit(_finished, predictor, answer))
    return futures


def _finished(predictor: Predictor, answer: Answer) -> list[MaskResult]:
    try:
        return predictor.masks_of(answer)
    except torch.OutOfMemoryError:
        if len(answer.crops.batches[0].placements) == 1:
            raise
    return _in_parts(answer.crops.halves(), lambda part: predictor.masks_of(predictor.answer(part)))


def ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The items of ``source``, which a thread pulls up to ``depth`` ahead; what it raises comes out in its place."""
    items: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(more: bool, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                items.put((more, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in source:
                if not put(True, item):
                    return
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised by the other thread
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=produce, name="crops", daemon=True)
    thread.start()
    try:
        while True:
            more, value = items.get()
            if not more:
                if value is not None:
                    assert isinstance(value, BaseException)
                    raise value
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
