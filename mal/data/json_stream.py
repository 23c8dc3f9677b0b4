"""Walks one JSON file of any size in bounded memory: its top-level members, and the elements of an array in chunks.

Nothing is known here about COCO. An array is cut into chunks of whole elements. A chunk is first cut by guess, at a
``},{`` near the end of the buffer, and the guess is proved by decoding: JSON is prefix-deterministic, so when
``[`` + text + ``]`` is a valid list, the text ends where an element ends. When no guess holds (elements with nested
objects, texts with ``},{`` in them, or values that a strict decoder refuses, as the NaN of Python's json), the elements
are found one by one by counting brackets: slower, always right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from mal.data.json_buffer import (
    END_OF_FILE,
    NO_END,
    JsonBuffer,
    end_before_trailing,
    parse,
    space_end,
    strict,
    value_end,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_BOM = b"\xef\xbb\xbf"
_CUTS_TRIED = 3
_CUT_WINDOW = 2**16

_OPEN_LIST, _CLOSE_LIST, _OPEN_OBJECT, _CLOSE_OBJECT, _COMMA, _COLON, _QUOTE = b'[]{},:"'


class Element(NamedTuple):
    """One element of an array: its byte position in the file and its text."""

    position: int
    text: bytes


class Decoder(Protocol[T_co]):
    """Turns a chunk of an array into whatever the caller wants."""

    def whole(self, text: bytes) -> T_co | None:
        """Decode a JSON list. Raises msgspec.DecodeError if it is not one; None asks for `each` instead."""

    def each(self, elements: list[Element]) -> T_co:
        """Decode elements one by one. Raises NotJsonError where one is not JSON."""


class JsonFile(JsonBuffer):
    """A `JsonBuffer` whose value is an object or a list."""

    def members(self) -> Iterator[Member]:
        """The members of the top-level object in order, or the top-level list as one member without a key.

        Raises:
            InputError: the file is not one JSON object or list.
        """
        first = self._begin()
        if first == _OPEN_LIST:
            yield from self._member(None)
        elif first == _OPEN_OBJECT:
            self._at += 1
            yield from self._object()
        elif first == END_OF_FILE:
            raise self.fail("the file is empty; expected a COCO file (a JSON object)")
        else:
            raise self.fail("the file holds neither a JSON object nor a list; is this a COCO file? It begins so")
        if self.skip_space() != END_OF_FILE:
            raise self.fail("there is text after the end of the JSON value; remove it (or are these JSON lines?)")

    def chunks(self, decoder: Decoder[T]) -> Iterator[T]:
        """The elements of the list that comes next, decoded chunk by chunk.

        Raises:
            InputError: it is not a list, or not JSON.
        """
        if self.skip_space() != _OPEN_LIST:
            raise self.fail("expected a list")
        self._at += 1
        if self.skip_space() == _CLOSE_LIST:
            self._at += 1
            return
        more = True
        while more:
            if self.skip_space() == _CLOSE_LIST:
                raise self.fail("not JSON: expected an element after ','")
            while len(self._buffer) - self._at < self._chunk_bytes and self.grow():
                pass
            decoded = self._by_guess(decoder) or self._one_by_one(decoder)
            yield decoded[0]
            more = decoded[1]

    # -- the top level -----------------------------------------------------------------------------------------------

    def _begin(self) -> int:
        if self._base == 0:
            while len(self._buffer) < len(_BOM) and self.grow():
                pass
            if self._buffer.startswith(_BOM):
                self._at = len(_BOM)
        return self.skip_space()

    def _object(self) -> Iterator[Member]:
        seen: set[str] = set()
        if self.skip_space() == _CLOSE_OBJECT:
            self._at += 1
            return
        while True:
            if self.skip_space() != _QUOTE:
                raise self.truncated() if self._ended_here() else self.fail("expected the name of a member")
            position = self.position
            key = self._decoded_key(self.value(), position)
            if key in seen:
                raise self.fail(f"the member {key!r} appears twice; keep one. The second is", position)
            seen.add(key)
            if self.skip_space() != _COLON:
                raise self.truncated() if self._ended_here() else self.fail(f"expected ':' after the name {key!r}")
            self._at += 1
            yield from self._member(key)
            after = self.skip_space()
            self._at += 1
            if after == _CLOSE_OBJECT:
                return
            if after != _COMMA:
                self._at -= 1
                raise self.truncated() if self._ended_here() else self.fail(f"expected ',' or '}}' after {key!r}")

    def _ended_here(self) -> bool:
        return self.skip_space() == END_OF_FILE

    def _decoded_key(self, text: bytes, position: int) -> str:
        with self.located():
            key = parse(text, position)
        assert isinstance(key, str)  # it begins with a quote
        return key

    def _member(self, key: str | None) -> Iterator[Member]:
        first = self.skip_space()
        if first == END_OF_FILE:
            raise self.truncated()
        member = Member(key, self.position, first == _OPEN_LIST, self)
        yield member
        if self.position == member.position:
            member.skip()

    # -- chunks ------------------------------------------------------------------------------------------------------

    def _by_guess(self, decoder: Decoder[T]) -> tuple[T, bool] | None:
        """Decode up to a guessed cut. Returns (what the decoder made of it, whether the list goes on), or None."""
        while True:
            for stop, resume in self._cuts():
                text = b"".join((b"[", memoryview(self._buffer)[self._at : stop], b"]" if resume else b"")).rstrip()
                try:
                    value, used = _decode_list(decoder, text)
                except msgspec.ValidationError:
                    return None
                except (msgspec.DecodeError, RecursionError):
                    continue
                if value is None:
                    return None
                self.check_utf8(text[:used], self.position - 1)
                closed = not resume or used < len(text)
                self._at = self._at + used - 1 if closed else resume
                return value, not closed
            if self._first_is_complete() or not self.grow():
                return None

    def _first_is_complete(self) -> bool:
        """Whether the next element is complete in the buffer (if not, reading on may help a guess)."""
        return value_end(self._buffer, self._at, last=self._ended) != NO_END

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Guessed (end of a chunk, start of the next element), the last ones first; (end of the buffer, 0) to close."""
        first = re.compile(rb'\{[ \t\r\n]*+("[^"\\]*+")').match(self._buffer, self._at)
        key = re.escape(first[1]) if first else b""
        boundary = re.compile(rb"\}[ \t\r\n]*+,[ \t\r\n]*+(?=\{[ \t\r\n]*+" + key + rb")")
        found: list[re.Match[bytes]] = []
        if not self._ended:
            window = max(self._at, len(self._buffer) - _CUT_WINDOW)
            found = list(boundary.finditer(self._buffer, window)) or list(boundary.finditer(self._buffer, self._at))
        for match in found[: -_CUTS_TRIED - 1 : -1]:
            yield match.start() + 1, match.end()
        if not found:
            yield len(self._buffer), 0

    def _one_by_one(self, decoder: Decoder[T]) -> tuple[T, bool]:
        """Find the elements by counting brackets, as many as the buffer holds."""
        while True:
            elements, at, more = self._elements()
            if elements:
                break
            if not self.grow():
                raise self.truncated()
        self.check_utf8(self._buffer[self._at : at], self.position)
        try:
            value = decoder.whole(b"[" + b",".join(element.text for element in elements) + b"]")
        except (msgspec.DecodeError, RecursionError):
            value = None
        if value is None:
            with self.located():
                value = decoder.each(elements)
        self._at = at
        return value, more

    def _elements(self) -> tuple[list[Element], int, bool]:
        """Elements in the buffer with the separator after each, where the rest begins, whether the list goes on."""
        elements: list[Element] = []
        taken = at = self._at
        while True:
            at = space_end(self._buffer, at)
            end = value_end(self._buffer, at, last=self._ended)
            if end == NO_END:
                return elements, taken, True
            after = space_end(self._buffer, end)
            if after == len(self._buffer):
                return elements, taken, True
            if end == at or self._buffer[after] not in (_COMMA, _CLOSE_LIST):
                expected = "an element" if end == at else "',' or ']'"
                raise self.fail(f"not JSON: expected {expected}", self._base + (after if end > at else at))
            elements.append(Element(self._base + at, self._buffer[at:end]))
            at = taken = space_end(self._buffer, after + 1)
            if self._buffer[after] == _CLOSE_LIST:
                return elements, after + 1, False


def _decode_list(decoder: Decoder[T], text: bytes) -> tuple[T | None, int]:
    """Decode the list that ``text`` begins with. Returns the decoder's value and how many bytes the list takes."""
    try:
        return decoder.whole(text), len(text)
    except msgspec.DecodeError as error:
        text = text[: end_before_trailing(text, error)]
    return decoder.whole(text), len(text)


@dataclass
class Member:
    """A member of the top-level object; take it by `chunks` or `value` before asking for the next, or it is skipped."""

    key: str | None
    position: int
    is_list: bool
    _file: JsonFile

    def chunks(self, decoder: Decoder[T]) -> Iterator[T]:
        """Its elements, decoded chunk by chunk. Raises InputError if it is not a list."""
        return self._file.chunks(decoder)

    def value(self) -> bytes:
        """Its text."""
        return self._file.value()

    def skip(self) -> None:
        """Pass over it, checking that it is JSON."""
        if self.is_list:
            for _ in self._file.chunks(TextDecoder()):
                pass
        else:
            self._file.value()


class TextDecoder:
    """Leaves the elements as JSON text: one text per chunk, elements separated by commas."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(list[msgspec.Raw])

    def whole(self, text: bytes) -> bytes:
        self._decoder.decode(text)
        return text[1:-1]

    def each(self, elements: list[Element]) -> bytes:
        return b",".join(strict(element.text, element.position) for element in elements)
