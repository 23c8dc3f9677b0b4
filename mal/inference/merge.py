"""From finished shards to one COCO JSON and the ledger of every box, streamed: no more than one row group in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mal import rows, storage
from mal.data.index import Index

_BLOCK = 8 * 2**20
_ROWS = 8192


@dataclass
class MergeCounts:
    """What became of the input's annotations."""

    labelled: int = 0
    clipped: int = 0
    """Labelled, after the box was clipped to its image; not counted in ``labelled``."""
    crowd: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason code."""

    @property
    def total(self) -> int:
        return self.labelled + self.clipped + self.crowd + self.rejected.total()


def merge(index: Index, shards: Sequence[str], label_path: str, ledger_path: str) -> MergeCounts:
    """Write the COCO file and the ledger, each atomically.

    The COCO file holds all that the input held beside its annotations, then one annotation per labelled box in the
    order of the shards, then the crowd annotations as they were. Rejected boxes are in the ledger alone.
    """
    counts = MergeCounts()
    encoder = msgspec.json.Encoder()
    with storage.open_write(label_path) as out, storage.open_write(ledger_path) as book:
        ledger = pq.ParquetWriter(book, rows.LEDGER, compression="zstd")
        ledger.write_table(_booked(index.rejected(), counts))
        first = _copy_rest(index, out)
        for batch in _label_batches(shards):
            ledger.write_table(_booked(_ledger_rows(batch), counts))
            labelled = batch.filter(pa.compute.is_valid(batch["counts"]))
            texts = [encoder.encode(_annotation(row)) for row in labelled.to_pylist()]
            first = _write_items(out, texts, first)
        _write_items(out, [text.encode() for text in index.kept()["text"].to_pylist()], first)
        out.write(b"\n]}\n")
        ledger.close()
    return counts


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
            for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS):
                yield pa.Table.from_batches([batch])


def _annotation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of rows.LABELS as a COCO annotation; fields that MAL did not understand come back as they were."""
    annotation: dict[str, Any] = {} if row["carried"] is None else _carried(row["carried"])
    annotation.update(
        id=row["id"],
        image_id=row["image_id"],
        category_id=row["category_id"],
        bbox=row["bbox"],
        iscrowd=0,
        area=row["area"],
        segmentation={"size": [row["height"], row["width"]], "counts": row["counts"]},
    )
    for name in ("score", "iou"):
        if row[name] is not None:
            annotation[name] = row[name]
    return annotation


_decode_carried = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _carried(text: str) -> dict[str, Any]:
    return _decode_carried(text)


def _ledger_rows(labels: pa.Table) -> pa.Table:
    """Rows of rows.LABELS as rows of rows.LEDGER."""
    compute = pa.compute
    outcome = compute.if_else(
        compute.is_valid(labels["reason"]), "rejected", compute.if_else(labels["clipped"], "clipped", "labelled")
    )
    columns = [labels["position"], labels["id"], labels["image_id"], outcome, labels["reason"]]
    return pa.table(columns, schema=rows.LEDGER)


def _booked(table: pa.Table, counts: MergeCounts) -> pa.Table:
    """``table`` (rows.LEDGER), after its outcomes were counted."""
    for outcome, reason in zip(table["outcome"].to_pylist(), table["reason"].to_pylist(), strict=True):
        if outcome == "rejected":
            counts.rejected[reason.partition(":")[0]] += 1
        else:
            setattr(counts, outcome, getattr(counts, outcome) + 1)
    return table
