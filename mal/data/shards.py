"""From boxes in file order to shards of work in image order: spilled buckets of boxes, and the writer of the index."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mal import rows
from mal.data.image_table import ImageTable

BOXES = pa.schema(
    [
        pa.field("rank", pa.int64()),  # of the image
        pa.field("position", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("category_id", pa.int64()),
        pa.field("bbox", pa.list_(pa.float64(), 4)),
        pa.field("score", pa.float64()),
        pa.field("clipped", pa.bool_()),
        pa.field("segmentation", pa.large_string()),
        pa.field("carried", pa.large_string()),
    ]
)
"""One row per box, before the boxes of an image are put together."""


class Buckets:
    """Rows put into numbered buckets, in memory or in one Arrow file per bucket; order is kept. A context manager.

    Args:
        schema: of the rows.
        count: how many buckets.
        folder: a local folder for the files; None keeps all in memory.
        name: what the files begin with.
    """

    def __init__(self, schema: pa.Schema, count: int, folder: Path | None, name: str) -> None:
        self.schema = schema
        self.count = count
        self._folder = folder
        self._name = name
        self._memory: list[list[pa.RecordBatch]] = [[] for _ in range(count)]
        self._writers: list[pa.ipc.RecordBatchFileWriter | None] = [None] * count

    def add(self, batch: pa.RecordBatch, bucket: NDArray[np.int64] | None = None) -> None:
        """Put each row of ``batch`` into its bucket (all into bucket 0 by default)."""
        if bucket is None or self.count == 1:
            self._put(0, batch)
            return
        order = np.argsort(bucket, kind="stable")
        batch = batch.take(pa.array(order))
        bounds = np.searchsorted(bucket[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            self._put(number, batch.slice(bounds[number], bounds[number + 1] - bounds[number]))

    def _put(self, number: int, batch: pa.RecordBatch) -> None:
        if self._folder is None:
            self._memory[number].append(batch)
            return
        writer = self._writers[number]
        if writer is None:
            writer = pa.ipc.new_file(str(self._folder / f"{self._name}-{number}.arrow"), self.schema)
            self._writers[number] = writer
        writer.write_batch(batch)

    def take(self, number: int) -> pa.Table:
        """All rows of a bucket; it is empty afterwards, and nothing more may be added to it."""
        writer = self._writers[number]
        if writer is None:
            batches, self._memory[number] = self._memory[number], []
            return pa.Table.from_batches(batches, self.schema)
        assert self._folder is not None
        writer.close()
        path = self._folder / f"{self._name}-{number}.arrow"
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        path.unlink()  # the mapping lives on
        return table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers:
            if writer is not None:
                writer.close()


class ShardWriter:
    """Writes ``index.parquet``: images in ascending order of id, packed greedily into row groups.

    A row group is a shard of at most ``shard_boxes`` boxes; an image with more is split into rows of ``shard_boxes``.
    """

    def __init__(self, file: BinaryIO, images: ImageTable, shard_boxes: int) -> None:
        self._images = images
        self._shard_boxes = shard_boxes
        # No statistics: nobody filters the index, and thousands of row groups make a large footer.
        self._writer = pq.ParquetWriter(
            file, rows.INDEX, compression="zstd", compression_level=1, write_statistics=False, use_dictionary=False
        )
        self._waiting = BOXES.empty_table()
        self.sizes: list[int] = []

    def add(self, boxes: pa.Table) -> None:
        """More boxes (`BOXES`), sorted by rank; all boxes of an image in one call, ranks above those before."""
        boxes = pa.concat_tables([self._waiting, boxes]).combine_chunks()
        starts, lengths = self._cut_rows(boxes["rank"].to_numpy())
        ends = starts + lengths
        begin = 0
        while begin < len(starts):
            end = int(np.searchsorted(ends, starts[begin] + self._shard_boxes, side="right"))
            if end == len(starts):
                break  # the last shard may take more
            self._write(boxes, starts[begin:end], lengths[begin:end])
            begin = end
        self._waiting = boxes.slice(starts[begin]) if len(starts) else boxes

    def close(self) -> None:
        """Write what is waiting, and the footer."""
        starts, lengths = self._cut_rows(self._waiting["rank"].to_numpy())
        if len(starts):
            self._write(self._waiting, starts, lengths)
        self._writer.close()

    def _cut_rows(self, rank: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First box and number of boxes of each row of the index: one image, or a part of an image with many boxes."""
        image_starts = np.flatnonzero(np.diff(rank, prepend=-1))
        counts = np.diff(image_starts, append=len(rank))
        parts = -(-counts // self._shard_boxes)
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = np.repeat(image_starts, parts) + part * self._shard_boxes
        return starts, np.minimum(np.repeat(counts, parts) - part * self._shard_boxes, self._shard_boxes)

    def _write(self, boxes: pa.Table, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        first, count = int(starts[0]), int(lengths.sum())
        chunk = boxes.slice(first, count).combine_chunks()
        image = boxes["rank"].to_numpy()[starts]
        columns = {field.name: _one_array(chunk[field.name], field.type) for field in rows.BOX}
        structs = pa.StructArray.from_arrays(list(columns.values()), fields=list(rows.BOX))
        offsets = pa.array(np.append(starts - first, count).astype(np.int32))
        table = pa.Table.from_arrays(
            [
                pa.array(self._images.id[image]),
                self._images.file_name.take(pa.array(image)).cast(pa.string()),
                pa.array(self._images.width[image].astype(np.int32)),
                pa.array(self._images.height[image].astype(np.int32)),
                pa.ListArray.from_arrays(offsets, structs, type=rows.INDEX.field("boxes").type),
            ],
            schema=rows.INDEX,
        )
        self._writer.write_table(table, row_group_size=len(starts))
        self.sizes.append(count)


def _one_array(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    return array if array.type == kind else array.cast(kind)
