"""From finished shards to one COCO JSON (or one per shard) and the ledger of every box: a few shards in memory."""

from __future__ import annotations

import contextlib
import gzip
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mal import rows, storage
from mal.data.index import Index
from mal.data.json_stream import JsonFile
from mal.errors import MalError
from mal.inference.annotations import OutputOptions, annotation_texts, joined
from mal.spec.derived import shards_folder

COPIED_BYTES = 8 * 2**20
"""How much of the rest of the input is copied at a time."""
_ROWS = 8192
_READ_AHEAD = 4
_COLUMNS = [name for name in rows.LABELS.names if name not in ("file_name", "model", "boundary_iou", "overlap")]
"""Columns that the output needs."""
_COMPRESSION = 3
"""Level of gzip: a third larger than at the highest, and several times faster."""


@dataclass
class MergeCounts:
    """What became of the input's annotations."""

    labelled: int = 0
    clipped: int = 0
    """Labelled, after the box was clipped to its image; not counted in ``labelled``."""
    crowd: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason code."""
    low_quality: int = 0
    """Of those labelled, clipped or not: masks below ``min_quality`` that are marked (dropped ones are rejected)."""

    @property
    def total(self) -> int:
        return self.labelled + self.clipped + self.crowd + self.rejected.total()


def merge(
    index: Index, shards: Sequence[str], label_path: str, ledger_path: str, options: OutputOptions | None = None
) -> MergeCounts:
    """Write the COCO file and the ledger, each atomically.

    The COCO file holds all that the input held beside its annotations, then one annotation per labelled box in the
    order of the shards, then the crowd annotations as they were. Rejected boxes are in the ledger alone.

    Args:
        label_path: compressed if it ends in ``.gz``.
        options: with ``per_shard`` there are files of that content in the folder `shards_folder` of ``label_path``.
    """
    options = options or OutputOptions()
    counts = MergeCounts()
    with storage.open_write(ledger_path) as book, pq.ParquetWriter(book, rows.LEDGER, compression="zstd") as ledger:
        for part in index.rejected_parts():
            ledger.write_table(_booked(part, counts))
        judged = _judged_and_booked(shards, options, ledger, counts)
        if options.per_shard:
            _write_files(index, judged, label_path, options)
        else:
            _write_one(index, judged, label_path, options)
    return counts


def _judged_and_booked(
    shards: Sequence[str], options: OutputOptions, ledger: pq.ParquetWriter, counts: MergeCounts
) -> Iterator[pa.Table]:
    """The rows of each shard with a mask; what becomes of all of them goes into the ledger."""
    for labels in _label_tables(shards):
        table = _judged(labels, options)
        ledger.write_table(_booked(_ledger_rows(table), counts))
        yield table.filter(pa.compute.is_valid(table["counts"]))


def _write_one(index: Index, labelled: Iterable[pa.Table], path: str, options: OutputOptions) -> None:
    with _open_labels(path) as out:
        items = open_annotations(index.rest_path, out)
        for table in labelled:
            items.write(annotation_texts(table, options))
        _write_kept(index, items)
        out.write(b"\n]}\n")


def _write_files(index: Index, labelled: Iterable[pa.Table], path: str, options: OutputOptions) -> None:
    """A COCO file per shard with its own images, and one with all that is left: other members, crowds, all images."""
    folder, ending = shards_folder(path), ".json.gz" if path.endswith(".gz") else ".json"
    categories = _categories(index)
    for number, table in enumerate(labelled):
        records = index.read_shard(number).select(["image_id", "file_name", "width", "height"]).to_pylist()
        images = {record["image_id"]: {"id": record.pop("image_id"), **record} for record in records}
        with _open_labels(storage.join(folder, f"part-{number:06d}{ending}")) as out:
            out.write(b'{"images": ' + msgspec.json.encode(list(images.values())))
            out.write(b',\n"categories": ' + categories + b',\n"annotations": [')
            _Items(out).write(annotation_texts(table, options))
            out.write(b"\n]}\n")
    with _open_labels(storage.join(folder, f"rest{ending}")) as out:
        _write_kept(index, open_annotations(index.rest_path, out))
        out.write(b"\n]}\n")


def _categories(index: Index) -> bytes:
    """The JSON text of the input's categories; an empty list if it has none."""
    with JsonFile(index.rest_path) as file:
        for member in file.members():
            if member.key == "categories":
                return member.value()
    return b"[]"


def _write_kept(index: Index, items: _Items) -> None:
    for kept in index.kept().to_batches(max_chunksize=_ROWS):
        items.write(kept["text"])


@contextlib.contextmanager
def _open_labels(path: str) -> Iterator[BinaryIO]:
    with storage.open_write(path) as file:
        if not path.endswith(".gz"):
            yield file
            return
        # Without a name and a time in it, the same labels give the same bytes.
        with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as packed:
            yield cast(BinaryIO, packed)


def open_annotations(rest_path: str, out: BinaryIO) -> _Items:
    """Begin a file with everything but the annotations: the object in ``rest_path``, left open."""
    held, copied = b"", 0  # the end of the object may lie blocks before the end of the file: only space follows it
    with storage.open_read(rest_path) as source:
        while block := source.read(COPIED_BYTES):
            held += block
            last = max(len(held.rstrip()) - 1, 0)
            out.write(held[:last])
            held, copied = held[last:], copied + last
    if held.rstrip() != b"}":
        raise MalError(f"{rest_path} is cut off; delete the index it is in and run again")
    empty = copied == 1  # nothing but the bracket
    out.write(b'"annotations": [' if empty else b',\n"annotations": [')
    return _Items(out)


class _Items:
    """Writes JSON texts as items of the array that is open."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._first = True

    def write(self, texts: pa.Array | pa.ChunkedArray) -> None:
        """The texts of a column without nulls."""
        if not len(texts):
            return
        lines = joined(",\n", texts.cast(pa.large_string()))
        chunks = lines.chunks if isinstance(lines, pa.ChunkedArray) else [lines]
        for chunk in chunks:
            text = _bytes_of(chunk)
            self._out.write(text[1:] if self._first else text)
            self._first = self._first and not len(chunk)


def _bytes_of(texts: pa.Array) -> memoryview:
    """All texts of a large_string array, one after the other, without copying them."""
    _, offsets, data = texts.buffers()
    if data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int64)
    return memoryview(data)[ends[texts.offset] : ends[texts.offset + len(texts)]]


def _label_tables(shards: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of each shard; a few are read ahead, as object stores take their time."""

    def read(path: str) -> pa.Table:
        return storage.retried(path, _read_columns)

    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="read-shard") as pool:
        left, running = deque(shards), deque[Future[pa.Table]]()
        while left or running:
            while left and len(running) < _READ_AHEAD:
                running.append(pool.submit(read, left.popleft()))
            yield running.popleft().result()


def _read_columns(path: str) -> pa.Table:
    with storage.open_read(path) as file:
        return pq.read_table(file, columns=_COLUMNS, use_threads=False)


def _judged(labels: pa.Table, options: OutputOptions) -> pa.Table:
    """``labels`` with the reason ``low_quality`` where it applies; without their masks, if they are to be dropped.

    Compared in float32, as the quality is stored.
    """
    compute = pa.compute
    least = pa.scalar(options.min_quality, pa.float32())
    low = compute.fill_null(compute.less(labels["quality"], least), False)
    low = compute.and_(low, compute.is_valid(labels["counts"]))
    if not compute.any(low).as_py():
        return labels
    detail = compute.cast(compute.round(compute.cast(labels["quality"], pa.float64()), 4), pa.string())
    reason = compute.binary_join_element_wise("low_quality", detail, ": ")
    labels = _with_column(labels, "reason", compute.if_else(low, reason, labels["reason"]))
    if not options.drop_low_quality:
        return labels
    return _with_column(labels, "counts", compute.if_else(low, pa.scalar(None, pa.string()), labels["counts"]))


def _with_column(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def _ledger_rows(labels: pa.Table) -> pa.Table:
    """Rows of rows.LABELS as rows of rows.LEDGER."""
    compute = pa.compute
    outcome = compute.if_else(
        compute.is_null(labels["counts"]), "rejected", compute.if_else(labels["clipped"], "clipped", "labelled")
    )
    columns = [labels["position"], labels["id"], labels["image_id"], outcome, labels["reason"]]
    return pa.table(columns, schema=rows.LEDGER)


def _booked(table: pa.Table, counts: MergeCounts) -> pa.Table:
    """``table`` (rows.LEDGER), after its outcomes were counted."""
    codes = pa.compute.replace_substring_regex(table["reason"], "(?s):.*", "")
    pairs = pa.table({"outcome": table["outcome"], "code": codes}).group_by(["outcome", "code"])
    for pair in pairs.aggregate([([], "count_all")]).to_pylist():
        outcome, code, number = pair["outcome"], pair["code"], pair["count_all"]
        if outcome == "rejected":
            counts.rejected[code] += number
        else:
            setattr(counts, outcome, getattr(counts, outcome) + number)
            counts.low_quality += number if code == "low_quality" else 0
    return table
