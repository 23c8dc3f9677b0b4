"""The index of a labelling run: a folder with the boxes of a COCO file as a table, and the account of the rest.

    index.parquet     `mal.rows.INDEX`: one row per image with its boxes, one row group per shard of work
    rejected.parquet  `mal.rows.LEDGER`: annotations that will not be labelled, rejected ones and crowds; in no order
    kept.parquet      `mal.rows.KEPT`: crowd annotations as they were
    rest.json         all top-level members of the input but ``annotations``, as they were
    summary.json      `Summary`; written last, so its presence means that the index is complete

`mal.data.index` makes it; this module opens it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mal import rows, storage
from mal.errors import InputError, StorageError

FORMAT = 1
"""Version of what is in the folder."""

INDEX_FILE, REJECTED_FILE, KEPT_FILE = "index.parquet", "rejected.parquet", "kept.parquet"
REST_FILE, SUMMARY_FILE = "rest.json", "summary.json"


@dataclass(frozen=True)
class Options:
    """What the index depends on besides its input."""

    load_mask: bool
    """Masks of the input are in the index."""
    shard_boxes: int
    """Most boxes of a shard; 0: `Summary.shard_boxes` was derived from the number of boxes."""
    max_image_pixels: int
    """Images whose record says more are rejected."""


@dataclass(frozen=True)
class Summary:
    """Counts of an index. annotations = boxes + crowd + the sum of rejected."""

    format: int
    fingerprint: str
    """32 hex digits of the content of the input files, wherever they lie."""
    options: Options
    annotations: int
    """In the input."""
    boxes: int
    """To be labelled."""
    clipped: int
    """Of these: leave their image."""
    crowd: int
    rejected: dict[str, int]
    """Reason code -> annotations."""
    images: int
    """With a usable id, each id once."""
    images_without_boxes: int
    """Of these: without a box to be labelled."""
    images_left_out: dict[str, int]
    """Image records not used: ``duplicate_id`` (the first one counts), ``bad_id``."""
    bands: dict[str, int]
    """Boxes to be labelled by the band of their clipped area."""
    categories: dict[int, str]
    unknown_category: int
    """Boxes to be labelled whose category_id the file does not explain."""
    has_scores: bool
    detections: bool
    """The input is a detector's list of results."""
    shard_boxes: int
    """Most boxes of a shard."""
    shards: list[int] = field(default_factory=list)
    """Boxes of each shard."""


class Index:
    """An index on disk. Holds the folder's path and the summary only: cheap to send to another process."""

    def __init__(self, folder: str, summary: Summary) -> None:
        self.folder = folder
        self.summary = summary
        self._metadata: pq.FileMetaData | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metadata": None}

    @property
    def shards(self) -> int:
        """Number of shards of work."""
        return len(self.summary.shards)

    @property
    def rest_path(self) -> str:
        """Path of the JSON object with the input's members besides its annotations."""
        return storage.join(self.folder, REST_FILE)

    def read_shard(self, number: int) -> pa.Table:
        """The rows (`mal.rows.INDEX`) of a shard.

        Raises:
            IndexError: there is no such shard.
            StorageError: the index cannot be read.
        """
        if not 0 <= number < self.shards:
            raise IndexError(f"shard {number} of {self.shards}")
        return storage.retried(storage.join(self.folder, INDEX_FILE), lambda path: self._row_group(path, number))

    def _row_group(self, path: str, number: int) -> pa.Table:
        with storage.open_read(path) as source:
            try:
                file = pq.ParquetFile(source, metadata=self._metadata)
                self._metadata = file.metadata
                return file.read_row_group(number).cast(rows.INDEX)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"{path}: cannot read shard {number}: {error}") from error

    def rejected(self) -> pa.Table:
        """The account (`mal.rows.LEDGER`) of the annotations that are not in the index, in no order."""
        return _read_table(storage.join(self.folder, REJECTED_FILE), rows.LEDGER)

    def rejected_parts(self) -> Iterator[pa.Table]:
        """`rejected`, some rows at a time."""
        path = storage.join(self.folder, REJECTED_FILE)
        with storage.open_read(path) as source:
            try:
                for batch in pq.ParquetFile(source).iter_batches():
                    yield pa.Table.from_batches([batch]).cast(rows.LEDGER)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"{path}: cannot read it: {error}") from error

    def kept(self) -> pa.Table:
        """Crowd annotations (`mal.rows.KEPT`)."""
        return _read_table(storage.join(self.folder, KEPT_FILE), rows.KEPT)


def open_index(folder: str) -> Index:
    """Open a complete index.

    Raises:
        InputError: there is none, or one of another version.
    """
    path = storage.join(folder, SUMMARY_FILE)
    if not storage.exists(path):
        raise InputError(f"{folder}: there is no complete index; run the same command again to build it")
    try:
        summary = msgspec.json.decode(storage.read_bytes(path), type=Summary)
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: not the summary of an index ({error}); delete the folder and run again") from None
    if summary.format != FORMAT:
        raise InputError(f"{path}: an index of version {summary.format}, this is {FORMAT}; delete it and run again")
    return Index(folder, summary)


def _read_table(path: str, schema: pa.Schema) -> pa.Table:
    with pa.BufferReader(storage.read_bytes(path)) as source:
        try:
            return pq.read_table(source).cast(schema)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{path}: cannot read it: {error}") from error
