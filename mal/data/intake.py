"""Where annotations go while an index is built: into shards of work, or into the account of the rest."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mal import boxes, rows, storage
from mal.data.checks import Checked, IdBook, check, clipped_areas
from mal.data.coco import NO_ID, Annotations
from mal.data.image_table import ImageTable
from mal.data.index_folder import INDEX_FILE, KEPT_FILE, REJECTED_FILE
from mal.data.shards import BOXES, Buckets, ShardWriter

_BUCKET_BYTES = 256 * 2**20  # of JSON text
_MOST_BUCKETS = 256
_IN_MEMORY_BYTES = 64 * 2**20
_SHARDS_WANTED, _LEAST_SHARD, _MOST_SHARD = 256, 128, 4096
_REPORT_SECONDS = 10.0
_CROWDS = pa.schema([*rows.KEPT, pa.field("id", pa.int64()), pa.field("image_id", pa.int64())])


@dataclass
class Counts:
    """What an input holds; the words are those of `mal.data.index_folder.Summary`."""

    annotations: int = 0
    boxes: int = 0
    clipped: int = 0
    crowd: int = 0
    images: int = 0
    """Images with boxes to be labelled."""
    has_scores: bool = False
    rejected: Counter[str] = field(default_factory=Counter)
    by_category: Counter[int] = field(default_factory=Counter)
    bands: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(boxes.BANDS), np.int64))
    shard_boxes: int = 0
    shards: list[int] = field(default_factory=list)


class Intake:
    """Takes annotations in file order (`add`), then writes them as shards (`write_shards`). A context manager.

    Boxes wait in buckets by ranges of image rank, in memory or, for a large input, in temporary files of this machine
    (in ``TMPDIR``), so that memory is bounded by the largest bucket.

    Args:
        folder: of the index; ``rejected.parquet`` and ``kept.parquet`` appear in it when the context ends well.
        size: bytes of the input, from which the number of buckets follows.
        progress: called with a line of text from time to time.
    """

    def __init__(self, folder: str, size: int, progress: Callable[[str], None] | None) -> None:
        self._folder = folder
        self._size = size
        self._progress = progress
        self._told = time.monotonic()
        self._counts = Counts()
        self._ids = IdBook()
        self._bucket_count = min(-(-size // _BUCKET_BYTES), _MOST_BUCKETS) if size > _IN_MEMORY_BYTES else 1

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            spill = None
            if self._size > _IN_MEMORY_BYTES:
                spill = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mal-index-")))
            self._boxes = stack.enter_context(Buckets(BOXES, self._bucket_count, spill, "boxes"))
            self._crowds = stack.enter_context(Buckets(_CROWDS, 1, spill, "crowds"))
            file = stack.enter_context(storage.open_write(storage.join(self._folder, REJECTED_FILE)))
            self._ledger = stack.enter_context(pq.ParquetWriter(file, rows.LEDGER, compression="zstd"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, chunk: Annotations, images: ImageTable, position: int) -> None:
        """Take the next annotations; ``position``: how many bytes of the input are read, for the progress line."""
        checked = check(chunk, images)
        self._counts.annotations += len(chunk)
        self._add_boxes(chunk, checked, len(images))
        rejected = sorted(checked.rejected)
        self._reject(
            np.array(rejected, np.int64) + chunk.first,
            chunk.id[rejected],
            chunk.image_id[rejected],
            [checked.rejected[row] for row in rejected],
        )
        crowd = sorted(chunk.crowd_text)
        if crowd:
            texts = [chunk.crowd_text[row].decode() for row in crowd]
            columns = [pa.array(np.array(crowd) + chunk.first), pa.array(texts, pa.string())]
            columns += [_nullable(chunk.id[crowd]), _nullable(chunk.image_id[crowd])]
            self._crowds.add(pa.RecordBatch.from_arrays(columns, schema=_CROWDS))
        claimed = chunk.id.copy()
        claimed[rejected] = NO_ID
        self._ids.add(claimed)
        self._tell(position)

    def _add_boxes(self, chunk: Annotations, checked: Checked, images: int) -> None:
        good = checked.good
        if not len(good):
            return
        taken = pa.array(good)
        nothing = pa.nulls(len(good), pa.large_string())
        score = chunk.score[good]
        self._counts.has_scores |= not np.isnan(score).all()
        columns = [
            pa.array(checked.rank),
            pa.array(good + chunk.first),
            pa.array(chunk.id[good]),
            pa.array(chunk.category_id[good]),
            pa.FixedSizeListArray.from_arrays(pa.array(chunk.bbox[good].ravel()), 4),
            pa.array(score, mask=np.isnan(score)),
            pa.array(checked.clipped),
            nothing if chunk.segmentation is None else chunk.segmentation.take(taken),
            nothing if chunk.carried is None else chunk.carried.take(taken),
        ]
        batch = pa.RecordBatch.from_arrays([a.cast(f.type) for a, f in zip(columns, BOXES, strict=True)], schema=BOXES)
        self._boxes.add(batch, checked.rank * self._bucket_count // images)

    def _reject(
        self, position: NDArray[np.int64], ids: NDArray[np.int64], image_ids: NDArray[np.int64], reasons: Sequence[str]
    ) -> None:
        self._counts.rejected.update(text.partition(":")[0] for text in reasons)
        self._account(position, _nullable(ids), _nullable(image_ids), "rejected", list(reasons))

    def _account(
        self,
        position: NDArray[np.int64],
        ids: pa.Array,
        image_ids: pa.Array,
        outcome: rows.Outcome,
        reasons: list[str] | None,
    ) -> None:
        if not len(position):
            return
        reason = pa.nulls(len(position), pa.string()) if reasons is None else pa.array(reasons, pa.string())
        outcomes = pa.array([outcome] * len(position), pa.string())
        table = pa.Table.from_arrays([pa.array(position), ids, image_ids, outcomes, reason], schema=rows.LEDGER)
        self._ledger.write_table(table)

    def write_shards(self, images: ImageTable, shard_boxes: int) -> Counts:
        """Write ``index.parquet`` and ``kept.parquet`` and complete the account. Call once, after the last `add`.

        Args:
            images: of the input.
            shard_boxes: most boxes of a shard, or 0.
        """
        duplicates = self._ids.duplicates()
        twice_crowd = self._write_crowds(duplicates)
        counts = self._counts
        total = counts.annotations - sum(counts.rejected.values()) - counts.crowd - (len(duplicates) - twice_crowd)
        counts.shard_boxes = shard_boxes or min(max(-(-total // _SHARDS_WANTED), _LEAST_SHARD), _MOST_SHARD)
        with storage.open_write(storage.join(self._folder, INDEX_FILE)) as file:
            writer = ShardWriter(file, images, counts.shard_boxes)
            for number in range(self._bucket_count):
                table = self._without_duplicates(self._boxes.take(number), images, duplicates)
                table = _by_rank(table)
                self._count_boxes(table, images)
                writer.add(table)
            writer.close()
            counts.shards = writer.sizes
        return counts

    def _write_crowds(self, duplicates: NDArray[np.int64]) -> int:
        """Write the crowds, but for those with an id taken before. Returns the number of these."""
        table = self._crowds.take(0)
        position = table["position"].to_numpy()
        twice = np.isin(position, duplicates)
        ids, image_ids = (table[name].combine_chunks() for name in ("id", "image_id"))
        both = pa.array(twice)
        reasons = [f"duplicate_id: {number}" for number in ids.filter(both).to_pylist()]
        self._counts.rejected.update({"duplicate_id": len(reasons)} if reasons else {})
        self._account(position[twice], ids.filter(both), image_ids.filter(both), "rejected", reasons)
        once = pc.invert(both)
        self._counts.crowd = int((~twice).sum())
        self._account(position[~twice], ids.filter(once), image_ids.filter(once), "crowd", None)
        with storage.open_write(storage.join(self._folder, KEPT_FILE)) as file:
            pq.write_table(table.filter(once).select(rows.KEPT.names).cast(rows.KEPT), file, compression="zstd")
        return len(reasons)

    def _without_duplicates(self, table: pa.Table, images: ImageTable, duplicates: NDArray[np.int64]) -> pa.Table:
        position = table["position"].to_numpy()
        twice = np.isin(position, duplicates)
        if not twice.any():
            return table
        ids = table["id"].to_numpy()[twice]
        reasons = [f"duplicate_id: {number}" for number in ids.tolist()]
        self._reject(position[twice], ids, images.id[table["rank"].to_numpy()[twice]], reasons)
        return table.filter(pa.array(~twice))

    def _count_boxes(self, table: pa.Table, images: ImageTable) -> None:
        rank = table["rank"].to_numpy()
        counts = self._counts
        counts.boxes += len(table)
        counts.clipped += pc.sum(table["clipped"]).as_py() or 0
        counts.images += len(np.unique(rank))
        bbox = table["bbox"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        areas = clipped_areas(bbox, images.width[rank], images.height[rank])
        counts.bands += np.bincount(boxes.band_index(areas), minlength=len(boxes.BANDS))
        ids, numbers = np.unique(table["category_id"].to_numpy(), return_counts=True)
        counts.by_category.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))

    def _tell(self, position: int) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._told >= _REPORT_SECONDS:
            self._told = now
            self._progress(
                f"index: {self._counts.annotations:,} annotations read, {position / self._size:.0%} of the file"
            )


def _by_rank(table: pa.Table) -> pa.Table:
    """Sorted by image; the boxes of an image stay in file order."""
    rank = table["rank"].to_numpy()
    if (rank[1:] >= rank[:-1]).all():
        return table
    return table.combine_chunks().take(pa.array(np.argsort(rank, kind="stable")))


def _nullable(ids: NDArray[np.int64]) -> pa.Array:
    return pa.array(ids, mask=ids == NO_ID)
