"""Label rows as the text of COCO annotations, column by column: no Python object per box.

Only rows whose carried fields have names that an annotation has anyway, or masks that go out as polygons, are made one
by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mal.data.json_buffer import dump
from mal.polygons import to_polygons

_OWN = ("id", "image_id", "category_id", "bbox", "iscrowd", "area", "segmentation", "score", "iou")
_QUALITY = ("quality", "low_quality")
"""Ours only if they are asked for, else the input's own."""
_CLASH = r'"(' + "|".join((*_OWN, *_QUALITY)) + r')"|\\u'
"""Carried fields of which one may have one of our names; an escaped letter may spell anything."""


@dataclass(frozen=True)
class OutputOptions:
    """How the COCO file is written. It is a view of the shards: other options need no other masks."""

    polygons: bool = False
    """Masks as polygons instead of RLEs; empty masks stay RLEs, as there is no polygon of nothing."""
    dump_quality: bool = False
    min_quality: float = 0.0
    drop_low_quality: bool = False
    """Leave masks below ``min_quality`` out, instead of marking them."""
    per_shard: bool = False
    """A COCO file per shard, instead of one."""

    @property
    def replaced(self) -> tuple[str, ...]:
        """Fields that are ours where they are written at all: the input's own would be taken for them."""
        marked = self.min_quality > 0 and not self.drop_low_quality
        return (*(("quality",) if self.dump_quality else ()), *(("low_quality",) if marked else ()))


def annotation_texts(table: pa.Table, options: OutputOptions) -> pa.Array:
    """The JSON text of each row's COCO annotation; fields that MAL did not understand come back as they were.

    Args:
        table: columns of rows.LABELS; every row has a mask.
    """
    own = _members(table, options)
    carried = table["carried"].combine_chunks().cast(pa.large_string())
    clash = pc.fill_null(pc.match_substring_regex(carried, _CLASH), False)
    inside = pc.utf8_slice_codeunits(carried, 1, -1)
    some = pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim(inside, " \t\r\n")), 0), False)
    before = pc.if_else(some, joined(pc.fill_null(inside, ""), ", "), _text(""))
    texts = joined("{", before, own, "}")
    if not pc.any(clash).as_py():
        return texts
    values = texts.to_pylist()
    for row in np.flatnonzero(clash.to_numpy(zero_copy_only=False)).tolist():
        values[row] = _by_hand(carried[row].as_py(), "{" + own[row].as_py() + "}", options.replaced)
    return pa.array(values, pa.large_string())


def _members(table: pa.Table, options: OutputOptions) -> pa.Array:
    """Our own members of each annotation, without the braces."""
    column = {name: table[name].combine_chunks() for name in table.column_names}
    number = {name: _number(column[name]) for name in ("id", "image_id", "category_id", "area", "height", "width")}
    sides = _number(column["bbox"].flatten())
    x, y, w, h = (sides.take(pa.array(np.arange(k, len(sides), 4))) for k in range(4))
    parts: list[str | pa.Array] = ['"id":', number["id"], ',"image_id":', number["image_id"]]
    parts += [',"category_id":', number["category_id"], ',"bbox":[', x, ",", y, ",", w, ",", h]
    parts += ['],"iscrowd":0,"area":', number["area"], ',"segmentation":', _segmentations(column, number, options)]
    for name in ("score", "iou", "quality") if options.dump_quality else ("score", "iou"):
        if column[name].null_count < len(table):
            parts.append(pc.fill_null(joined(f',"{name}":', _number(column[name].cast(pa.float64()))), ""))
    if column["reason"].null_count < len(table):
        parts.append(pc.if_else(pc.is_valid(column["reason"]), _text(',"low_quality":true'), _text("")))
    return joined(*parts)


def _segmentations(column: dict[str, pa.Array], number: dict[str, pa.Array], options: OutputOptions) -> pa.Array:
    counts = pc.replace_substring(column["counts"].cast(pa.large_string()), "\\", "\\\\")
    texts = joined('{"size":[', number["height"], ",", number["width"], '],"counts":"', counts, '"}')
    if not options.polygons:
        return texts
    values = texts.to_pylist()
    sizes = zip(*(column[name].to_pylist() for name in ("counts", "height", "width", "area")), strict=True)
    for row, (rle, height, width, area) in enumerate(sizes):
        if area:
            values[row] = msgspec.json.encode(to_polygons(rle, height, width)).decode()
    return pa.array(values, pa.large_string())


_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _by_hand(carried: str, own: str, replaced: tuple[str, ...]) -> str:
    """The carried fields but those that are ``replaced``, then our own instead of those of the same name."""
    decode: Any = _decode
    encode: Any = msgspec.json.encode
    try:
        fields = decode(carried)
    except msgspec.DecodeError:  # half a character, which only Python's json knows
        decode, encode = json.loads, dump
        fields = decode(carried)
    text: bytes = encode({name: fields[name] for name in fields if name not in replaced} | decode(own))
    return text.decode()


def _number(values: pa.Array) -> pa.Array:
    """Numbers as JSON has them; every double reads back as itself."""
    return values.cast(pa.large_string())


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())


def joined(*parts: str | pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts put together row by row; null where a part is null."""
    texts = [_text(part) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*texts, _text(""))
