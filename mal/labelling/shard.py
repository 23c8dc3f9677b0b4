"""One shard: its rows of the index in, its label rows out. Plain Python, no Ray.

Images come decoded, once each (`mal.labelling.decoding`); their boxes wait in one queue per band, and a queue that is
full is run as one batch, so that the boxes of one band go through the mask head together (`mal.labelling.pipeline`).
What an image's work raises besides `ImageError` is not handled here: `mal.labelling.actor` finds the image.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mal import boxes, masks, quality, rows
from mal.boxes import Box
from mal.errors import InputError
from mal.labelling.decoding import HELD_BYTES, Images, InThreads, decode_image
from mal.labelling.pipeline import predict_all
from mal.labelling.task import LabelTask
from mal.labelling.waiting import Waiting
from mal.postprocess import clean
from mal.predictor import BoxItem, MaskResult, Predictor

_OF_BOX = ("position", "id", "category_id", "bbox", "score", "clipped", "carried")
_OF_IMAGE = ("image_id", "file_name", "height", "width")


def label_rows(
    task: LabelTask,
    predictor: Predictor,
    images: Images | ThreadPoolExecutor,
    index_rows: pa.Table,
    waiting: Waiting | None = None,
) -> pa.Table:
    """Label every box of some rows of the index.

    Args:
        images: gives the images, or has the threads that decode them. What decoding raises besides ImageError comes
            out of here.
        index_rows: rows.INDEX.
        waiting: measures how long the network waits for images.

    Returns:
        rows.LABELS, one row per box in the order of ``position``, rejected boxes included.
    """
    if isinstance(images, ThreadPoolExecutor):
        images = InThreads(images, functools.partial(decode_image, task), task.decode_threads)
    work = _Work(index_rows)
    labels = _Labels(task, work)
    batches = _batches(task, work, labels, images)
    for batch, results in predict_all(predictor, batches, overlap=task.overlap, waiting=waiting):
        for place, result in zip(batch, results, strict=True):
            labels.add(place, result)
    return labels.table()


def rejected_rows(task: LabelTask, index_rows: pa.Table, reason: str) -> pa.Table:
    """Rows of rows.LABELS that reject every box of some rows of the index for ``reason``, without reading an image."""
    work = _Work(index_rows)
    labels = _Labels(task, work)
    for place in range(len(work)):
        labels.reasons[place] = reason
    return labels.table()


class _Work:
    """The boxes of some rows of the index, as columns of length n; a *place* is a box's number among them."""

    def __init__(self, index_rows: pa.Table) -> None:
        self.records = index_rows.select(list(_OF_IMAGE)).to_pylist()
        lists = index_rows["boxes"].combine_chunks()
        lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
        counts = lists.value_lengths().to_numpy(zero_copy_only=False)
        image = np.repeat(np.arange(len(counts)), counts)
        self.ends = np.cumsum(counts)
        structs = lists.flatten()
        columns = dict(zip([field.name for field in rows.BOX], structs.flatten(), strict=True))
        self.truths: list[str | None] = columns["segmentation"].to_pylist()
        sizes = [(record["height"], record["width"]) for record in self.records]
        self.sizes = [sizes[k] for k in image.tolist()]
        self.columns = {name: columns[name] for name in _OF_BOX}
        self.columns |= {name: index_rows[name].take(pa.array(image)) for name in _OF_IMAGE}
        xywh = columns["bbox"].flatten().to_numpy().reshape(-1, 4)
        size = np.array([(r["width"], r["height"]) for r in self.records], np.float64).reshape(-1, 2)[image]
        # The arithmetic of `boxes.clip`, for all boxes at once.
        low, high = np.maximum(xywh[:, :2], 0.0), np.minimum(xywh[:, :2] + xywh[:, 2:], size)
        assert (high > low).all(), "the index holds only boxes that overlap their image"
        self.boxes = [Box(*corners) for corners in np.concatenate([low, high], axis=1).tolist()]
        sides = high - low
        self.bands = boxes.band_index(sides[:, 0] * sides[:, 1]).tolist()
        starts = [0, *self.ends[:-1].tolist()] if len(self.ends) else []
        of_images = (boxes.overlaps(self.boxes[a:b]) for a, b in zip(starts, self.ends.tolist(), strict=True))
        self.overlaps = [overlap for found in of_images for overlap in found]

    def __len__(self) -> int:
        return len(self.boxes)


def _batches(
    task: LabelTask, work: _Work, labels: _Labels, images: Images
) -> Iterator[tuple[list[int], list[BoxItem]]]:
    """The places of boxes that go through the network together, and what it needs of them.

    Images wait until each of their boxes is in a full batch. Where they are so large that this would take more than
    HELD_BYTES, what is waiting goes through as it is.
    """
    queues: list[list[tuple[int, BoxItem]]] = [[] for _ in boxes.BANDS]
    first, held = 0, 0
    for (_, decoded), end in zip(images(work.records), work.ends.tolist(), strict=True):
        if isinstance(decoded, str):
            labels.reasons[first:end] = [decoded] * (end - first)
            first = end
            continue
        for place in range(first, end):
            queue = queues[work.bands[place]]
            queue.append((place, BoxItem(decoded, work.boxes[place])))
            if len(queue) == task.batch_size:
                yield _pulled(queue)
        first = end
        held = held + decoded.nbytes if any(queues) else 0
        if held > HELD_BYTES // 2:
            yield from _rest(queues, task.batch_size)
            held = 0
    yield from _rest(queues, task.batch_size)


def _pulled(queue: list[tuple[int, BoxItem]]) -> tuple[list[int], list[BoxItem]]:
    batch = [place for place, _ in queue], [item for _, item in queue]
    queue.clear()
    return batch


def _rest(queues: list[list[tuple[int, BoxItem]]], size: int) -> Iterator[tuple[list[int], list[BoxItem]]]:
    """What is left of each band, in batches that may mix bands: the network sorts them."""
    rest = [waiting for queue in queues for waiting in queue]
    for queue in queues:
        queue.clear()
    for start in range(0, len(rest), size):
        yield _pulled(rest[start : start + size])


class _Labels:
    """What becomes of the boxes of some work, as columns."""

    def __init__(self, task: LabelTask, work: _Work) -> None:
        self._task, self._work = task, work
        count = len(work)
        self.reasons: list[str | None] = [None] * count
        self._found: list[MaskResult | None] = [None] * count
        self._iou: list[float | None] = [None] * count
        self._boundary_iou: list[float | None] = [None] * count

    def add(self, place: int, result: MaskResult) -> None:
        """Take the mask of a box: cleaned, and compared with the input's if masks are loaded."""
        size = self._work.sizes[place]
        if self._task.cleaning:
            counts = clean(result.counts, *size, self._task.cleaning)
            area, bounds = masks.area(counts, *size), masks.bounds(counts, *size)
            result = result._replace(counts=counts, area=area, bounds=bounds)
        self._found[place] = result
        truth = self._work.truths[place]
        if truth is not None:
            try:
                wanted = masks.from_segmentation(json.loads(truth), *size)
            except InputError:  # the box is labelled all the same; there is nothing to compare its mask with
                return
            own = masks.rle(result.counts, *size)
            self._iou[place], self._boundary_iou[place] = masks.iou(own, wanted), masks.boundary_iou(own, wanted)

    def table(self) -> pa.Table:
        """rows.LABELS, by ``position``."""
        columns = {
            **self._work.columns,
            "counts": [found and found.counts for found in self._found],
            "area": [found and found.area for found in self._found],
            "iou": self._iou,
            "boundary_iou": self._boundary_iou,
            **self._quality(),
            "agreement": [found and found.agreement for found in self._found],
            "model": pa.repeat(self._task.model_id, len(self._work)),
            "reason": self.reasons,
        }
        arrays = [_column(columns[field.name], field.type) for field in rows.LABELS]
        return pa.Table.from_arrays(arrays, schema=rows.LABELS).sort_by("position")

    def _quality(self) -> dict[str, NDArray[np.float64] | pa.Array]:
        """The estimate of each mask's IoU, and what it is made of; null where there is no mask."""
        evidence = np.full((len(self._work), len(quality.Evidence._fields)), np.nan)
        for place, found in enumerate(self._found):
            if found is not None:
                box = self._work.boxes[place]
                evidence[place] = quality.evidence(
                    box,
                    found.area,
                    quality.tightness(found.bounds, box),
                    mean_probability=found.mean_probability,
                    stability=found.stability,
                    overlap=self._work.overlaps[place],
                    agreement=found.agreement,
                )
        there = np.array([found is not None for found in self._found], dtype=bool)
        estimates = np.full(len(there), np.nan)
        if there.any():
            estimates[there] = self._estimates(evidence, there)
        names = quality.Evidence._fields
        shown = ("mean_probability", "stability", "tightness", "overlap")
        measured = {name: evidence[:, names.index(name)] for name in shown}
        return {name: pa.array(values, mask=~there) for name, values in ({"quality": estimates} | measured).items()}

    def _estimates(self, evidence: NDArray[np.float64], there: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The quality of the masks that are ``there``."""
        if self._task.calibration is None:
            return quality.default_quality(evidence[there])
        categories = np.array(self._work.columns["category_id"].to_pylist(), dtype=object)[there]
        names = [self._task.categories.get(category, str(category)) for category in categories]
        return self._task.calibration(evidence[there], names)


def _column(values: object, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, kind)
