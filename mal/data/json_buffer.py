"""A JSON file seen through a buffer: the next value, where it ends, and strict text of what Python takes for JSON."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa

from mal import storage
from mal.errors import InputError

CHUNK_BYTES = 16 * 2**20
"""How much of a file is read and decoded at a time."""
NO_END = -1
END_OF_FILE = -1

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(_STRING.pattern + rb'|[{}\[\]"]', re.DOTALL)
_SCALAR = re.compile(rb'[^ \t\r\n,:\[\]{}"]++')
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
_INTEGER_DIGITS = 400  # beyond the range of a double


class NotJsonError(ValueError):
    """An element is not JSON. ``position``: byte in the file."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class JsonBuffer:
    """A forward-only view of a file that holds one JSON value.

    Args:
        path: local or remote.
        chunk_bytes: how much is read at a time; memory is a few times this, or a few times the largest element.
        start: byte position of a value inside the file to begin at (a `Member.position`).
        on_block: called with every block of bytes read, in order, in another thread (for a checksum).

    A thread reads one block ahead.
    """

    def __init__(
        self,
        path: str,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        start: int = 0,
        on_block: Callable[[bytes], None] | None = None,
    ) -> None:
        self.path = path
        self._chunk_bytes = chunk_bytes
        self._on_block = on_block
        self._file: pa.NativeFile = storage.open_read(path)
        self._file.seek(start)
        self._offset = start
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-json")
        self._coming = self._reader.submit(self._read)
        self._buffer = b""
        self._at = 0
        self._base = start
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._file.close()

    @property
    def position(self) -> int:
        """Byte position in the file of what comes next."""
        return self._base + self._at

    def fail(self, what: str, position: int | None = None) -> InputError:
        """The error for a file that cannot be used."""
        return InputError(f"{self.path}: {what} at byte {self.position if position is None else position:,}")

    def value(self) -> bytes:
        """The text of the value that comes next, whole, as `strict` JSON."""
        self.skip_space()
        while (end := value_end(self._buffer, self._at, last=self._ended)) == NO_END:
            if not self.grow():
                raise self.truncated()
        position, text = self.position, self._buffer[self._at : end]
        self.check_utf8(text, position)
        self._at = end
        with self.located():
            return strict(text, position)

    def grow(self) -> bool:
        """Read on, dropping what was taken; at least doubles what is held. False at the end of the file."""
        if self._ended:
            return False
        rest = memoryview(self._buffer)[self._at :]
        parts: list[bytes | memoryview] = [rest] if rest else []
        wanted = 2 * len(rest)
        while not self._ended and sum(map(len, parts)) <= wanted:
            block = self._coming.result()
            self._ended = not block
            if block:
                parts.append(block)
                self._coming = self._reader.submit(self._read)
        if len(parts) == bool(rest):
            return False
        self._base += self._at
        self._buffer = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        self._at = 0
        return True

    def _read(self) -> bytes:
        """Read the next block (in the reader's thread, ahead of the need)."""
        block = storage.retried(self.path, self._read_on)
        if block and self._on_block is not None:
            self._on_block(block)
        return block

    def _read_on(self, path: str) -> bytes:
        """The next bytes of the file, which is opened anew at their place if it broke before."""
        if self._file.closed:
            self._file = storage.open_read(path)
            self._file.seek(self._offset)
        try:
            block: bytes = self._file.read(self._chunk_bytes)
        except (OSError, pa.ArrowException):
            self._file.close()
            raise
        self._offset += len(block)
        return block

    def skip_space(self) -> int:
        """Move to the next byte that is not white space and return it; -1 at the end of the file."""
        while True:
            self._at = space_end(self._buffer, self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self.grow():
                return END_OF_FILE

    def truncated(self) -> InputError:
        """The error for a file that ends too early."""
        end = self._base + len(self._buffer)
        return self.fail("the JSON is cut off; the file is incomplete, copy or write it again. It ends", end)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Turn NotJsonError into the error that names the file."""
        try:
            yield
        except NotJsonError as error:
            raise self.fail(f"not JSON ({error}); the mistake is", error.position) from None

    def check_utf8(self, text: bytes, position: int) -> None:
        """Raise InputError unless ``text``, which begins at ``position``, is UTF-8."""
        if text.isascii():
            return
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise self.fail(
                "the file is not UTF-8; convert it. The first wrong byte is", position + error.start
            ) from None


def space_end(buffer: bytes, at: int) -> int:
    """The first place from ``at`` on that is not white space."""
    match = _SPACE.match(buffer, at)
    assert match is not None
    return match.end()


def value_end(buffer: bytes, at: int, *, last: bool) -> int:
    """Where the value that begins at ``at`` ends; ``at`` itself if there is no value; NO_END if it leaves the buffer.

    Only brackets and quotes are looked at: the text in between may not be JSON. ``last``: the buffer is the end of the
    file, so that a number may end with it.
    """
    if at >= len(buffer):
        return NO_END
    if buffer[at] in b"[{":
        return _bracket_end(buffer, at)
    if buffer[at] in b'"':
        match = _STRING.match(buffer, at)
        return match.end() if match else NO_END
    match = _SCALAR.match(buffer, at)
    if match is None:
        return at
    return match.end() if match.end() < len(buffer) or last else NO_END


def _bracket_end(buffer: bytes, at: int) -> int:
    depth = 0
    for match in _BRACKET.finditer(buffer, at):
        byte = buffer[match.start()]
        if byte in b"[{":
            depth += 1
        elif byte in b"]}":
            depth -= 1
            if depth == 0:
                return match.end()
        elif match.end() == match.start() + 1:
            return NO_END  # a string that leaves the buffer
    return NO_END


def value_length(decoder: msgspec.json.Decoder[Any], text: memoryview) -> int:
    """Length of the list or object that ``text`` begins with. Raises msgspec.DecodeError if it is not as wanted."""
    try:
        decoder.decode(text)
    except msgspec.DecodeError as error:
        return end_before_trailing(text, error)
    return len(text)


def end_before_trailing(text: bytes | memoryview, error: msgspec.DecodeError) -> int:
    """Where the list or object ends that ``text`` begins with, if ``error`` is that more follows; else raises it."""
    trailing = _TRAILING.search(str(error))
    if trailing is None:
        raise error
    closing = b"]" if text[0] in b"[" else b"}"
    end = int(trailing[1]) - 1  # there is the first character too many; only space lies between it and the bracket
    while end > 0 and text[end - 1] not in closing:
        end -= 1
    return end


def strict(text: bytes, position: int) -> bytes:
    """The same JSON value as text that every JSON reader accepts: NaN and infinite numbers become null.

    Args:
        text: one JSON value, or what Python's json takes for one.
        position: its byte position in the file, for the error.

    Raises:
        NotJsonError: it is not JSON.
    """
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return dump(parse(text, position))
    return text


def parse(text: bytes, position: int) -> Any:
    """One JSON value as Python's json reads it (NaN and Infinity included). Raises NotJsonError."""
    characters = text.decode()
    try:
        return json.loads(characters, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg, position + len(characters[: error.pos].encode())) from None
    except RecursionError:
        raise NotJsonError("nested too deeply", position) from None


def dump(value: Any) -> bytes:
    """Strict JSON text of a value; numbers that JSON does not know become null."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value)).encode()


def whole_characters(text: str) -> str:
    """The text with lone surrogates, halves of characters that JSON can spell and UTF-8 cannot, as ``\\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _integer(digits: str) -> int | float:
    """Python refuses to read integers of thousands of digits; they are infinite for every purpose here."""
    return int(digits) if len(digits) <= _INTEGER_DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
