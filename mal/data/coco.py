"""Reads COCO's lists of annotations and images, chunk by chunk, into columns.

Three layers, each slower and more forgiving than the one before:

1. typed decoding of a whole chunk (`msgspec`), unknown fields refused;
2. the same with the unknown fields added to the type as raw JSON text: the *carried* fields;
3. one object at a time with Python's json, for chunks with a value of the wrong type or with NaN: a bad annotation
   costs only itself.

``id``, ``image_id`` and ``category_id`` are integers of at most 63 bits (``12.0`` counts as one, ``true`` and ``"12"``
do not). ``iscrowd`` may be 0, 1, true, false or null. ``area`` of the input is not kept: an output's is its mask's. A
``score`` that is no number is carried like a field that is not understood.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mal.data.json_buffer import dump, parse, strict, value_length, whole_characters
from mal.data.json_stream import Element

NO_ID = -(2**63)
"""Stands in columns of ids for an id that is missing or unusable."""

Id = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
_ABSENT = msgspec.Raw(b"")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)` - at `\$", re.DOTALL)
_KNOWN = frozenset(("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "score"))
_BRACES_TRIED = 8
_ODD_KEY = re.compile(r'[\\"\x00-\x1f]')  # msgspec has no fields of such names
_MOST_CARRIED = 64
_DETAIL_CHARACTERS = 200


@dataclass
class Annotations:
    """One chunk of annotations as columns of length n; rows with a fault hold values without meaning."""

    first: int
    """Position of the first in the list of annotations."""
    id: NDArray[np.int64]
    image_id: NDArray[np.int64]
    category_id: NDArray[np.int64]
    bbox: NDArray[np.float64]
    """[n, 4] x, y, w, h."""
    score: NDArray[np.float64]
    """NaN where there is none."""
    crowd: NDArray[np.bool_]
    segmentation: pa.Array | None
    """JSON text or null, if masks are loaded."""
    carried: pa.Array | None
    """JSON object of the fields not understood, or null."""
    faults: dict[int, str]
    """Row -> reason (`mal.rows.REASONS`) for annotations that cannot be used."""
    crowd_text: dict[int, bytes]
    """Row -> JSON text of each crowd annotation."""

    def __len__(self) -> int:
        return len(self.id)


def reason(code: str, value: object = None) -> str:
    """``code`` or ``code: detail``, the detail shortened."""
    if value is None:
        return code
    detail = whole_characters(value) if isinstance(value, str) else dump(value).decode()
    return f"{code}: {detail if len(detail) <= _DETAIL_CHARACTERS else detail[:_DETAIL_CHARACTERS] + '...'}"


class AnnotationDecoder:
    """Decodes chunks of a list of annotations (`mal.data.json_stream.Decoder`), in file order.

    Args:
        load_mask: keep ``segmentation``.
        ids_optional: the list is a detector's; an annotation without an id gets its position + 1.
    """

    def __init__(self, *, load_mask: bool, ids_optional: bool) -> None:
        self._load_mask = load_mask
        self._ids_optional = ids_optional
        self._next = 0
        self._raw = msgspec.json.Decoder(list[msgspec.Raw])
        self._carry([])

    def _carry(self, keys: list[str]) -> None:
        """Make the decoders anew for annotations with these fields besides COCO's."""
        self._extra = {f"extra_{number}": key for number, key in enumerate(keys)}
        fields: list[Any] = [
            ("image_id", Id),
            ("category_id", Id),
            ("bbox", tuple[float, float, float, float]),
            ("id", Id, NO_ID) if self._ids_optional else ("id", Id),
            ("iscrowd", int | bool | None, 0),
            ("score", float | None, None),
            ("area", msgspec.Raw, _ABSENT),
            ("segmentation", msgspec.Raw, _ABSENT),
            *((name, msgspec.Raw, _ABSENT) for name in self._extra),
        ]
        self._struct: Any = msgspec.defstruct(
            "Annotation", fields, forbid_unknown_fields=True, gc=False, kw_only=True, rename=self._extra
        )
        self._many = msgspec.json.Decoder(list[self._struct])  # type: ignore[name-defined]
        self._one = msgspec.json.Decoder(self._struct)

    def whole(self, text: bytes) -> Annotations | None:
        """Layers 1 and 2. Raises msgspec.DecodeError if the text is not a JSON list; None: `each` is needed."""
        while True:
            try:
                structs = self._many.decode(text)
            except msgspec.ValidationError as error:
                if not self._learn(error):
                    return None
                continue
            break
        crowd = _column(structs, "iscrowd", np.bool_)
        rows = np.flatnonzero(crowd).tolist()
        texts = self._crowd_texts(text, structs, rows) if rows else {}
        return self._columns(structs, crowd, {}, texts, {})

    def each(self, elements: list[Element]) -> Annotations:
        """Layer 3. Raises NotJsonError."""
        structs: list[Any] = []
        faults: dict[int, str] = {}
        texts: dict[int, bytes] = {}
        carried: dict[int, str] = {}
        for row, element in enumerate(elements):
            try:
                struct: Any = self._one.decode(element.text)
            except (msgspec.DecodeError, RecursionError):
                value = parse(element.text, element.position)
                struct, fault, extra = self._by_hand(value)
                if fault:
                    faults[row] = fault
                if extra:
                    carried[row] = extra
            structs.append(struct)
            if struct.iscrowd:
                texts[row] = strict(element.text, element.position)
        return self._columns(structs, _column(structs, "iscrowd", np.bool_), faults, texts, carried)

    def _crowd_texts(self, text: bytes, structs: list[Any], rows: list[int]) -> dict[int, bytes]:
        """Row -> JSON text of the crowd annotations of a chunk.

        They are few, so each is looked for around a raw value of its own, whose place in the chunk is known. If that
        does not find them all, the whole chunk is taken apart.
        """
        texts: dict[int, bytes] = {}
        for row in rows:
            found = self._object_around(text, structs[row])
            if found is None:
                raw = self._raw.decode(text)
                return {row: bytes(raw[row]) for row in rows}
            texts[row] = found
        return texts

    def _object_around(self, text: bytes, struct: Any) -> bytes | None:
        """The text of the annotation that ``struct`` was decoded from; None if it was not found."""
        start = _offset(struct.area, text) or _offset(struct.segmentation, text)
        for _ in range(_BRACES_TRIED if start else 0):
            start = text.rfind(b"{", 0, start)
            if start < 0:
                break
            with contextlib.suppress(msgspec.DecodeError):
                end = value_length(self._one, memoryview(text)[start:]) + start
                found: Any = self._one.decode(text[start:end])
                if all(getattr(found, name) == getattr(struct, name) for name in ("id", "image_id", "bbox", "iscrowd")):
                    return text[start:end]
        return None

    def _learn(self, error: msgspec.ValidationError) -> bool:
        """Add the unknown field that the error names to the carried ones; False if it is another error."""
        match = _UNKNOWN_FIELD.match(str(error))
        keys = list(self._extra.values())
        if match is None or match[1] in keys or len(keys) == _MOST_CARRIED or _ODD_KEY.search(match[1]):
            return False
        self._carry([*keys, match[1]])
        return True

    def _by_hand(self, value: Any) -> tuple[Any, str | None, str | None]:
        """Any JSON value as a struct, the reason why it cannot be used, and its carried fields."""
        if not isinstance(value, dict):
            return self._placeholder(), reason("not_an_object", value), None
        crowd = _is_crowd(value.get("iscrowd"))
        ids = {key: as_integer(value.get(key)) for key in ("id", "image_id", "category_id")}
        bbox, fault = _bbox(value.get("bbox"))
        if ids["category_id"] is None:
            fault = _bad("bad_category", value, "category_id")
        if ids["image_id"] is None:
            fault = _bad("bad_image_id", value, "image_id")
        if ids["id"] is None and not (self._ids_optional and value.get("id") is None):
            fault = _bad("bad_id", value, "id")
        score = _number(value.get("score"))
        mask = value.get("segmentation")
        struct = self._struct(
            bbox=bbox,
            iscrowd=int(crowd),
            score=score,
            segmentation=_ABSENT if mask is None else msgspec.Raw(dump(mask)),
            **{key: NO_ID if number is None else number for key, number in ids.items()},
        )
        extra = {key: item for key, item in value.items() if key not in _KNOWN}
        if score is None and value.get("score") is not None:
            extra["score"] = value["score"]
        return struct, None if crowd else fault, dump(extra).decode() if extra else None

    def _placeholder(self) -> Any:
        return self._struct(id=NO_ID, image_id=NO_ID, category_id=NO_ID, bbox=(0.0, 0.0, 0.0, 0.0))

    def _columns(
        self,
        structs: list[Any],
        crowd: NDArray[np.bool_],
        faults: dict[int, str],
        texts: dict[int, bytes],
        carried: dict[int, str],
    ) -> Annotations:
        count, first = len(structs), self._next
        self._next += count
        ids = _column(structs, "id", np.int64)
        if self._ids_optional:
            ids = np.where(ids == NO_ID, np.arange(first + 1, first + count + 1), ids)
            ids[[row for row, fault in faults.items() if fault.startswith(("bad_id", "not_an_object"))]] = NO_ID
        corners = itertools.chain.from_iterable(map(attrgetter("bbox"), structs))
        return Annotations(
            first=first,
            id=ids,
            image_id=_column(structs, "image_id", np.int64),
            category_id=_column(structs, "category_id", np.int64),
            bbox=np.fromiter(corners, np.float64, 4 * count).reshape(count, 4),
            score=_optional_numbers(list(map(attrgetter("score"), structs))),
            crowd=crowd,
            segmentation=_texts(structs, "segmentation") if self._load_mask else None,
            carried=self._carried_column(structs, carried),
            faults=faults,
            crowd_text=texts,
        )

    def _carried_column(self, structs: list[Any], by_hand: dict[int, str]) -> pa.Array | None:
        if not self._extra and not by_hand:
            return None
        column = pa.nulls(len(structs), pa.large_string())
        if self._extra:
            members = []
            for name, key in self._extra.items():
                text = _texts(structs, name, keep_null=True)
                members.append(pc.fill_null(_joined(", " + dump(key).decode() + ": ", text), _text("")))
            # Not joined with null_handling="skip": Arrow 26 loses the rows in which all parts are null.
            inside = pc.utf8_slice_codeunits(_joined(*members), 2)
            column = pc.if_else(pc.equal(inside, _text("")), _text(None), _joined("{", inside, "}"))
        if by_hand:
            values = column.to_pylist()
            for row, text in by_hand.items():
                values[row] = text
            column = pa.array(values, pa.large_string())
        return column


def _column(structs: Sequence[Any], name: str, dtype: type) -> NDArray[Any]:
    return np.fromiter(map(attrgetter(name), structs), dtype, len(structs))


def _offset(raw: msgspec.Raw, text: bytes) -> int:
    """Where in ``text``, from which it was decoded, a raw value lies; 0 if it is absent or not a part of it."""
    part, whole = (np.frombuffer(data, np.uint8).__array_interface__["data"][0] for data in (raw, text))
    return part - whole if whole <= part < whole + len(text) else 0


def _optional_numbers(values: list[float | None]) -> NDArray[np.float64]:
    missing = values.count(None)
    if missing == len(values):
        return np.full(len(values), np.nan)
    return np.array(values, np.float64)  # None becomes NaN


def _texts(structs: Sequence[Any], name: str, *, keep_null: bool = False) -> pa.Array:
    """Raw JSON texts as a column; null where the field is absent (or JSON's null, unless ``keep_null``)."""
    texts = [bytes(raw) for raw in map(attrgetter(name), structs)]
    column = pa.array(texts, pa.large_binary()).cast(pa.large_string())
    absent = pc.equal(column, _text("")) if keep_null else pc.is_in(column, pa.array(["", "null"], pa.large_string()))
    return pc.if_else(absent, _text(None), column)


def _text(value: str | None) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())


def _joined(*parts: str | pa.Array) -> pa.Array:
    """Texts put together row by row; null where a part is null."""
    texts = [_text(part) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*texts, _text(""))


def _bad(code: str, value: dict[str, Any], key: str) -> str:
    return reason(code, value[key]) if key in value else reason(code, "missing")


def as_integer(value: Any) -> int | None:
    """The value as an integer of at most 63 bits, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) < value < 2**63 else None


def _number(value: Any) -> float | None:
    """The value as a finite double, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _bbox(value: Any) -> tuple[tuple[float, ...], str | None]:
    """The bbox, and the reason why it is not four finite numbers (the sides are checked with the image)."""
    nothing = (0.0, 0.0, 0.0, 0.0)
    if value is None:
        return nothing, reason("bad_bbox", "missing")
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or any(isinstance(side, bool) or not isinstance(side, int | float) for side in value):
        return nothing, reason("bad_bbox", value)
    sides = [_number(side) for side in value]
    if any(side is None for side in sides):
        return nothing, reason("not_finite", ", ".join(map(str, value)))
    return tuple(side for side in sides if side is not None), None


def _is_crowd(value: Any) -> bool:
    """COCO's flag as people write it; texts other than "1" and "true" mean no crowd."""
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true")
    return isinstance(value, int | float) and bool(value)
