"""One shard: its rows of the index in, its label rows out. Plain Python, no Ray.

Images are decoded ahead by threads, once each; their boxes wait in one queue per band, and a queue that is full is run
as one batch, so that the boxes of one band go through the mask head together.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mal import boxes, masks, rows
from mal.data import images
from mal.labelling.task import LabelTask
from mal.predictor import BoxItem, MaskResult, Predictor


@dataclass(slots=True)
class _Waiting:
    """A box on its way: its half-filled label row, and what the predictor needs."""

    row: dict[str, Any]
    truth: str | None
    item: BoxItem


def label_rows(
    task: LabelTask,
    predictor: Predictor,
    pool: ThreadPoolExecutor,
    index_rows: pa.Table,
    *,
    poisoned: Sequence[int] = (),
) -> pa.Table:
    """Label every box of some rows of the index.

    Args:
        index_rows: rows.INDEX.
        poisoned: places in ``index_rows`` whose image has killed its process: they are rejected unread.

    Returns:
        rows.LABELS, one row per box in the order of the index, rejected boxes included.
    """
    finished: list[dict[str, Any]] = []
    queues: list[list[_Waiting]] = [[] for _ in boxes.BANDS]
    for record, decoded in _decoded_ahead(task, pool, index_rows, poisoned):
        if isinstance(decoded, str):
            finished += [_label_row(task, record, box, reason=decoded) for box in record["boxes"]]
            continue
        for box in record["boxes"]:
            waiting = _waiting(task, record, box, decoded)
            queue = queues[int(boxes.band_index([boxes.area(waiting.item.box)])[0])]
            queue.append(waiting)
            if len(queue) == task.batch_size:
                finished += _run(predictor, queue)
                queue.clear()
    # What is left of each band goes through together, in batches that may mix bands: the network sorts them.
    rest = [waiting for queue in queues for waiting in queue]
    for start in range(0, len(rest), task.batch_size):
        finished += _run(predictor, rest[start : start + task.batch_size])
    finished.sort(key=lambda row: row["position"])
    return pa.Table.from_pylist(finished, schema=rows.LABELS)


def _decoded_ahead(
    task: LabelTask, pool: ThreadPoolExecutor, index_rows: pa.Table, poisoned: Sequence[int]
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8] | str]]:
    """Each row with its image, or with the reason why there is none; a few images ahead of the consumer."""
    ahead: deque[tuple[dict[str, Any], Future[NDArray[np.uint8] | str]]] = deque()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [future.cancel() for _, future in ahead])
        for place, record in enumerate(_records(index_rows)):
            ahead.append((record, pool.submit(_decode, task, record, place in poisoned)))
            if len(ahead) > task.decode_threads:
                waiting, future = ahead.popleft()
                yield waiting, future.result()
        while ahead:
            waiting, future = ahead.popleft()
            yield waiting, future.result()


def _records(index_rows: pa.Table) -> Iterable[dict[str, Any]]:
    for batch in index_rows.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _decode(task: LabelTask, record: dict[str, Any], poisoned: bool) -> NDArray[np.uint8] | str:
    """The image of an index row as RGB [H, W, 3], or the reason why its boxes are rejected."""
    if poisoned:
        return "crashed"
    try:
        path = images.safe_join(task.img_dir, record["file_name"])
        expected = (record["width"], record["height"])
        return images.decode(path, expected=expected, max_pixels=task.max_image_pixels)
    except images.ImageError as error:
        return error.reason


def _waiting(task: LabelTask, record: dict[str, Any], box: dict[str, Any], image: NDArray[np.uint8]) -> _Waiting:
    inside = boxes.clip(boxes.from_xywh(box["bbox"]), record["width"], record["height"])
    assert inside is not None, "the index holds only boxes that overlap their image"
    return _Waiting(_label_row(task, record, box), box["segmentation"], BoxItem(image, inside))


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


def _run(predictor: Predictor, batch: Sequence[_Waiting]) -> list[dict[str, Any]]:
    """Fill in the masks of a batch."""
    results = predictor.predict([waiting.item for waiting in batch])
    return [_filled(waiting, result) for waiting, result in zip(batch, results, strict=True)]


def _filled(waiting: _Waiting, result: MaskResult) -> dict[str, Any]:
    row = waiting.row
    row["counts"], row["area"] = result.counts, result.area
    if waiting.truth is not None:
        size = (row["height"], row["width"])
        truth = masks.from_segmentation(json.loads(waiting.truth), *size)
        row["iou"] = masks.iou(masks.rle(result.counts, *size), truth)
    return row
