"""From finished shards to one COCO JSON and the ledger of every box, streamed: no more than one row group in memory."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mal import rows, storage
from mal.data.index import Index
from mal.polygons import to_polygons

_BLOCK = 8 * 2**20
_ROWS = 8192
_COLUMNS = [name for name in rows.LABELS.names if name not in ("file_name", "model", "boundary_iou")]
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


@dataclass(frozen=True)
class OutputOptions:
    """How the COCO file is written. It is a view of the shards: other options need no other masks."""

    polygons: bool = False
    """Masks as polygons instead of RLEs; empty masks stay RLEs, as there is no polygon of nothing."""
    dump_quality: bool = False
    min_quality: float = 0.0
    drop_low_quality: bool = False
    """Leave masks below ``min_quality`` out, instead of marking them."""


def merge(
    index: Index, shards: Sequence[str], label_path: str, ledger_path: str, options: OutputOptions | None = None
) -> MergeCounts:
    """Write the COCO file and the ledger, each atomically.

    The COCO file holds all that the input held beside its annotations, then one annotation per labelled box in the
    order of the shards, then the crowd annotations as they were. Rejected boxes are in the ledger alone.

    Args:
        label_path: compressed if it ends in ``.gz``.
    """
    options = options or OutputOptions()
    counts = MergeCounts()
    encoder = msgspec.json.Encoder()
    with _open_labels(label_path) as out, storage.open_write(ledger_path) as book:
        ledger = pq.ParquetWriter(book, rows.LEDGER, compression="zstd")
        ledger.write_table(_booked(index.rejected(), counts))
        first = _copy_rest(index, out)
        for labels in _label_batches(shards):
            batch = _judged(labels, options)
            ledger.write_table(_booked(_ledger_rows(batch), counts))
            labelled = batch.filter(pa.compute.is_valid(batch["counts"]))
            texts = [encoder.encode(_annotation(row, options)) for row in labelled.to_pylist()]
            first = _write_items(out, texts, first)
        for kept in index.kept().to_batches(max_chunksize=_ROWS):
            first = _write_items(out, [text.encode() for text in kept["text"].to_pylist()], first)
        out.write(b"\n]}\n")
        ledger.close()
    return counts


@contextlib.contextmanager
def _open_labels(path: str) -> Iterator[BinaryIO]:
    with storage.open_write(path) as file:
        if not path.endswith(".gz"):
            yield file
            return
        # Without a name and a time in it, the same labels give the same bytes.
        with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as packed:
            yield cast(BinaryIO, packed)


def _copy_rest(index: Index, out: BinaryIO) -> bool:
    """Begin the file with everything but the annotations; returns True: no annotation has been written yet."""
    with storage.open_read(index.rest_path) as source:
        left = source.size()
        empty = source.size() < 16 and not json.loads(source.read())
        source.seek(0)
        while left > 0:
            block = source.read(min(_BLOCK, left))
            left -= len(block)
            out.write(block if left else block.rstrip().removesuffix(b"}"))
    out.write(b'"annotations": [' if empty else b',\n"annotations": [')
    return True


def _write_items(out: BinaryIO, texts: Sequence[bytes], first: bool) -> bool:
    """Write JSON texts as items of the array that is open; returns whether the next one is still the first."""
    if not texts:
        return first
    out.write((b"\n" if first else b",\n") + b",\n".join(texts))
    return False


def _label_batches(shards: Sequence[str]) -> Iterator[pa.Table]:
    for path in shards:
        with storage.open_read(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS, columns=_COLUMNS):
                yield pa.Table.from_batches([batch])


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


def _annotation(row: dict[str, Any], options: OutputOptions) -> dict[str, Any]:
    """A row of rows.LABELS as a COCO annotation; fields that MAL did not understand come back as they were."""
    annotation: dict[str, Any] = {} if row["carried"] is None else _carried(row["carried"])
    for stale in ("quality", "low_quality"):  # of an earlier labelling, whose output is the input now
        annotation.pop(stale, None)
    annotation.update(
        id=row["id"],
        image_id=row["image_id"],
        category_id=row["category_id"],
        bbox=row["bbox"],
        iscrowd=0,
        area=row["area"],
        segmentation={"size": [row["height"], row["width"]], "counts": row["counts"]},
    )
    if options.polygons and row["area"]:
        annotation["segmentation"] = to_polygons(row["counts"], row["height"], row["width"])
    for name in ("score", "iou", "quality") if options.dump_quality else ("score", "iou"):
        if row[name] is not None:
            annotation[name] = row[name]
    if row["reason"] is not None:
        annotation["low_quality"] = True
    return annotation


_decode_carried = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _carried(text: str) -> dict[str, Any]:
    return _decode_carried(text)


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
    codes = pa.compute.replace_substring_regex(table["reason"], ":.*", "")
    pairs = pa.table({"outcome": table["outcome"], "code": codes}).group_by(["outcome", "code"])
    for pair in pairs.aggregate([([], "count_all")]).to_pylist():
        outcome, code, number = pair["outcome"], pair["code"], pair["count_all"]
        if outcome == "rejected":
            counts.rejected[code] += number
        else:
            setattr(counts, outcome, getattr(counts, outcome) + number)
            counts.low_quality += number if code == "low_quality" else 0
    return table
