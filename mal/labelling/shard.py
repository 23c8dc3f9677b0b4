"""One shard: its rows of the index in, its label rows out. Plain Python, no Ray.

Images are decoded ahead by threads, once each; their boxes wait in one queue per band, and a queue that is full is run
as one batch, so that the boxes of one band go through the mask head together. What an image's work raises besides
`ImageError` is not handled here: `mal.labelling.actor` finds the image.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mal import boxes, masks, quality, rows
from mal.data import images
from mal.errors import InputError
from mal.labelling.task import LabelTask
from mal.postprocess import clean
from mal.predictor import BoxItem, MaskResult, Predictor

Decode = Callable[[dict[str, Any]], NDArray[np.uint8]]
"""A row of rows.INDEX -> its image as RGB [H, W, 3] of the size in the row. Raises ImageError."""


@dataclass(slots=True)
class _Waiting:
    """A box on its way: its half-filled label row, and what the predictor needs."""

    row: dict[str, Any]
    truth: str | None
    item: BoxItem


def label_rows(
    task: LabelTask, predictor: Predictor, pool: ThreadPoolExecutor, index_rows: pa.Table, decode: Decode | None = None
) -> pa.Table:
    """Label every box of some rows of the index.

    Args:
        index_rows: rows.INDEX.
        decode: run in the threads of ``pool``; by default `decode_image`. What it raises besides ImageError comes out
            of here.

    Returns:
        rows.LABELS, one row per box in the order of the index, rejected boxes included.
    """
    finished: list[dict[str, Any]] = []
    queues: list[list[_Waiting]] = [[] for _ in boxes.BANDS]
    decode = decode or functools.partial(decode_image, task)
    for record, decoded in _decoded_ahead(pool, index_rows, decode, ahead=task.decode_threads):
        if isinstance(decoded, str):
            finished += [_label_row(task, record, box, reason=decoded) for box in record["boxes"]]
            continue
        for waiting in _arrived(task, record, decoded):
            queue = queues[int(boxes.band_index([boxes.area(waiting.item.box)])[0])]
            queue.append(waiting)
            if len(queue) == task.batch_size:
                finished += _run(task, predictor, queue)
                queue.clear()
    # What is left of each band goes through together, in batches that may mix bands: the network sorts them.
    rest = [waiting for queue in queues for waiting in queue]
    for start in range(0, len(rest), task.batch_size):
        finished += _run(task, predictor, rest[start : start + task.batch_size])
    return _table(finished)


def rejected_rows(task: LabelTask, index_rows: pa.Table, reason: str) -> pa.Table:
    """Rows of rows.LABELS that reject every box of some rows of the index for ``reason``, without reading an image."""
    return _table(
        [_label_row(task, record, box, reason=reason) for record in _records(index_rows) for box in record["boxes"]]
    )


def _table(label_rows: list[dict[str, Any]]) -> pa.Table:
    label_rows.sort(key=lambda row: row["position"])
    return pa.Table.from_pylist(label_rows, schema=rows.LABELS)


def decode_image(task: LabelTask, record: dict[str, Any]) -> NDArray[np.uint8]:
    """The image of an index row, read from ``task.img_dir``. Raises ImageError."""
    path = images.safe_join(task.img_dir, record["file_name"])
    expected = (record["width"], record["height"])
    return images.decode(path, expected=expected, max_pixels=task.max_image_pixels)


def _decoded_ahead(
    pool: ThreadPoolExecutor, index_rows: pa.Table, decode: Decode, ahead: int
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8] | str]]:
    """Each row with its image, or with the reason why there is none; ``ahead`` images ahead of the consumer."""

    def tried(record: dict[str, Any]) -> NDArray[np.uint8] | str:
        try:
            return decode(record)
        except images.ImageError as error:
            return error.reason

    queue: deque[tuple[dict[str, Any], Future[NDArray[np.uint8] | str]]] = deque()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [future.cancel() for _, future in queue])
        for record in _records(index_rows):
            queue.append((record, pool.submit(tried, record)))
            if len(queue) > ahead:
                waiting, future = queue.popleft()
                yield waiting, future.result()
        while queue:
            waiting, future = queue.popleft()
            yield waiting, future.result()


def _records(index_rows: pa.Table) -> Iterable[dict[str, Any]]:
    for batch in index_rows.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _arrived(task: LabelTask, record: dict[str, Any], image: NDArray[np.uint8]) -> Iterator[_Waiting]:
    """The boxes of an image that has been decoded."""
    inside = []
    for box in record["boxes"]:
        clipped = boxes.clip(boxes.from_xywh(box["bbox"]), record["width"], record["height"])
        assert clipped is not None, "the index holds only boxes that overlap their image"
        inside.append(clipped)
    for box, clipped, overlap in zip(record["boxes"], inside, boxes.overlaps(inside), strict=True):
        row = _label_row(task, record, box) | {"overlap": overlap}
        yield _Waiting(row, box["segmentation"], BoxItem(image, clipped))


def _label_row(
    task: LabelTask, record: dict[str, Any], box: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    """A row of rows.LABELS without its mask."""
    return {
        **{name: box[name] for name in ("position", "id", "category_id", "bbox", "score", "clipped", "carried")},
        **{name: record[name] for name in ("image_id", "file_name", "height", "width")},
        "model": task.model_id,
        "reason": reason,
    }


def _run(task: LabelTask, predictor: Predictor, batch: Sequence[_Waiting]) -> list[dict[str, Any]]:
    """Fill in the masks of a batch; one that is too large for the device's memory goes through in halves."""
    try:
        results = predictor.predict([waiting.item for waiting in batch])
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    else:
        evidence = [_fill(task, waiting, result) for waiting, result in zip(batch, results, strict=True)]
        rows = [waiting.row for waiting in batch]
        for row, value in zip(rows, _estimates(task, rows, np.array(evidence)), strict=True):
            row["quality"] = float(value)
        return rows
    half = len(batch) // 2
    return _run(task, predictor, batch[:half]) + _run(task, predictor, batch[half:])


def _fill(task: LabelTask, waiting: _Waiting, result: MaskResult) -> quality.Evidence:
    """Put a mask and all that was measured of it into its row; returns what its quality is estimated from."""
    row, box = waiting.row, waiting.item.box
    size = (row["height"], row["width"])
    counts, pixels = result.counts, result.area
    if task.cleaning:
        counts = clean(counts, *size, task.cleaning)
        pixels = masks.area(counts, *size)
    row["counts"], row["area"] = counts, pixels
    if waiting.truth is not None:
        row.update(_compared(masks.rle(counts, *size), waiting.truth))
    evidence = quality.evidence(
        box,
        pixels,
        quality.tightness(masks.bounds(counts, *size), box),
        mean_probability=result.mean_probability,
        stability=result.stability,
        overlap=row["overlap"],
        agreement=result.agreement,
    )
    row["mean_probability"], row["stability"] = evidence.mean_probability, evidence.stability
    row["tightness"], row["agreement"] = evidence.tightness, result.agreement
    return evidence


def _compared(mask: masks.Rle, truth: str) -> dict[str, float]:
    """What a mask has in common with that of the input file, its JSON text; nothing if that cannot be used."""
    try:
        wanted = masks.from_segmentation(json.loads(truth), *mask["size"])
    except InputError:  # the box is labelled all the same; there is nothing to compare its mask with
        return {}
    return {"iou": masks.iou(mask, wanted), "boundary_iou": masks.boundary_iou(mask, wanted)}


def _estimates(
    task: LabelTask, label_rows: Sequence[dict[str, Any]], evidence: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The quality of some masks."""
    if task.calibration is None:
        return quality.default_quality(evidence)
    names = [task.categories.get(row["category_id"], str(row["category_id"])) for row in label_rows]
    return task.calibration(evidence, names)
