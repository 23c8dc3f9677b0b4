"""The images of a COCO file as columns sorted by id: what a box is checked against, and what its row says."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mal.data.coco import NO_ID, Id, as_integer, reason
from mal.data.images import SUSPICIOUS_NAME, leaves_folder
from mal.data.json_buffer import parse
from mal.data.json_stream import Element

_MOST_SIDE = 2**31 - 1
Side = Annotated[int, msgspec.Meta(ge=1, le=_MOST_SIDE)]


class _Image(msgspec.Struct, gc=False):
    id: Id
    width: Side
    height: Side
    file_name: Annotated[str, msgspec.Meta(min_length=1)]


class ImageTable:
    """Images in ascending order of id, each id once; *rank* is the place in this order.

    Attributes:
        id, width, height: int64 [n]; sizes in pixels, 0 where the record has none that is usable.
        file_name: n strings, relative to the image folder.
        problems: rank -> reason why no box of the image can be labelled.
        duplicates: records left out because an earlier one has the same id.
        unusable: records left out because they have no usable id.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        width: NDArray[np.int64],
        height: NDArray[np.int64],
        file_name: pa.Array,
        problems: dict[int, str],
    ) -> None:
        """Takes the columns in file order, ``problems`` by row of the file; NO_ID marks unusable ids."""
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        usable = ordered != NO_ID
        first = np.ones(len(ids), dtype=bool)
        first[1:] = ordered[1:] != ordered[:-1]
        self.unusable = int(len(ids) - usable.sum())
        self.duplicates = int((usable & ~first).sum())
        rows = order[usable & first]
        self.id, self.width, self.height = ids[rows], width[rows], height[rows]
        self.file_name = file_name.take(pa.array(rows))
        at = np.array(sorted(problems), dtype=np.int64)
        rank_of = dict(zip(rows[np.isin(rows, at)].tolist(), np.flatnonzero(np.isin(rows, at)).tolist(), strict=True))
        self.problems = {rank_of[row]: text for row, text in problems.items() if row in rank_of}
        self.problem_ranks = np.array(sorted(self.problems), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.id)

    def rank(self, image_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rank of each image id; -1 for unknown ones."""
        if not len(self):
            return np.full(len(image_id), -1)
        rank = np.minimum(np.searchsorted(self.id, image_id), len(self) - 1)
        return np.where(self.id[rank] == image_id, rank, -1)


class ImageDecoder:
    """Decodes chunks of a list of images; `table` puts them together.

    Args:
        max_pixels: images with more are a problem (``too_large``).
    """

    def __init__(self, *, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._decoder = msgspec.json.Decoder(list[_Image])
        self._numbers: list[NDArray[np.int64]] = []
        self._names: list[pa.Array] = []
        self._problems: dict[int, str] = {}
        self._count = 0

    def whole(self, text: bytes) -> int | None:
        """The good path: every record of the chunk is as it should be. Returns the number of records."""
        try:
            records: list[Any] = self._decoder.decode(text)
        except msgspec.ValidationError:
            return None
        return self._add(*([*map(attrgetter(name), records)] for name in ("id", "width", "height", "file_name")))

    def each(self, elements: list[Element]) -> int:
        """Record by record; what is wrong with one is kept as the problem of its boxes. Raises NotJsonError."""
        columns: list[list[Any]] = [[], [], [], []]
        for row, element in enumerate(elements):
            value = parse(element.text, element.position)
            record = value if isinstance(value, dict) else {}
            image_id = as_integer(record.get("id"))
            sides = [as_integer(record.get(name)) for name in ("width", "height")]
            name = record.get("file_name")
            if not isinstance(name, str) or not name:
                self._problems[self._count + row] = reason("bad_image_record", f"file_name is {name!r}")
                name = ""
            for number, key in zip(sides, ("width", "height"), strict=True):
                if number is None or not 1 <= number <= _MOST_SIDE:
                    self._problems[self._count + row] = reason("bad_image_record", f"{key} is {record.get(key)!r}")
            usable = [number if number is not None and 1 <= number <= _MOST_SIDE else 0 for number in sides]
            for column, item in zip(columns, (NO_ID if image_id is None else image_id, *usable, name), strict=True):
                column.append(item)
        return self._add(*columns)

    def _add(self, ids: list[int], width: list[int], height: list[int], names: list[str]) -> int:
        numbers = np.array([ids, width, height], dtype=np.int64)
        # A lone surrogate, which JSON can spell, is no character of a file name.
        clean = [name.encode("utf-8", "replace").decode() for name in names] if _has_surrogates(names) else names
        column = pa.array(clean, pa.large_string())
        for row in np.flatnonzero(pc.match_substring_regex(column, SUSPICIOUS_NAME).to_numpy(zero_copy_only=False)):
            if leaves_folder(names[row]):
                self._problems.setdefault(self._count + int(row), reason("unsafe_path", names[row]))
        for row in np.flatnonzero(numbers[1] * numbers[2] > self._max_pixels):
            size = f"{numbers[1][row]} x {numbers[2][row]} pixels, the limit is {self._max_pixels}"
            self._problems.setdefault(self._count + int(row), reason("too_large", size))
        self._numbers.append(numbers)
        self._names.append(column)
        self._count += len(ids)
        return len(ids)

    def table(self) -> ImageTable:
        """All images decoded so far."""
        numbers = np.concatenate([np.empty((3, 0), np.int64), *self._numbers], axis=1)
        names = pa.concat_arrays([pa.array([], pa.large_string()), *self._names])
        return ImageTable(numbers[0], numbers[1], numbers[2], names, self._problems)


def _has_surrogates(names: list[str]) -> bool:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return True
    return False
