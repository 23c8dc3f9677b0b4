"""Files encrypted at rest with a key that a person chose: AES-256-GCM in pieces, so that a writer holds no second copy.

Format: ``MALENC1\\n``, 16 bytes of salt, then pieces: 4 bytes of length, nonce and tag included in the ciphertext's
piece. The key is derived from the person's by scrypt with the salt. Every piece is authenticated together with its
number and with whether it is the last, so a file that was cut, reordered or changed does not open.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from mal.errors import CheckpointError, WrongKeyError

ENVIRONMENT = "MAL_ENCRYPTION_KEY"
"""Environment variable that holds the key, where the spec does not."""

MAGIC = b"MALENC1\n"
_SALT_BYTES, _NONCE_BYTES = 16, 12
_PIECE_BYTES = 4 * 2**20
_LENGTH = struct.Struct(">I")
_PLACE = struct.Struct(">Q?")


def is_encrypted(data: bytes | memoryview) -> bool:
    """Whether ``data`` begins as `write_encrypted` writes."""
    return bytes(data[: len(MAGIC)]) == MAGIC


@contextlib.contextmanager
def sealed(file: BinaryIO, key: str | None) -> Iterator[BinaryIO]:
    """A file to write clear data to, front to back; ``file`` gets it encrypted, or as it is if there is no key."""
    if not key:
        yield file
        return
    sealing = _Sealing(file, key)
    yield cast(BinaryIO, sealing)
    sealing.finish()


def write_encrypted(file: BinaryIO, data: bytes | memoryview, key: str) -> None:
    """Write ``data`` encrypted with ``key``, some megabytes at a time."""
    with sealed(file, key) as clear:
        clear.write(data)


class _Sealing(io.RawIOBase):
    """Encrypts what is written to it, piece by piece, into another file."""

    def __init__(self, file: BinaryIO, key: str) -> None:
        salt = os.urandom(_SALT_BYTES)
        self._file, self._cipher = file, _cipher(key, salt)
        self._buffer, self._pieces, self._written = bytearray(), 0, 0
        file.write(MAGIC + salt)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Clear bytes written."""
        return self._written

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while len(self._buffer) + len(view) > _PIECE_BYTES:  # a full piece may be the last one: it waits
            room = _PIECE_BYTES - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            self._seal(last=False)
        self._buffer += view
        self._written += size
        return size

    def finish(self) -> None:
        """Write the last piece."""
        self._seal(last=True)

    def _seal(self, last: bool) -> None:
        nonce = os.urandom(_NONCE_BYTES)
        piece = nonce + self._cipher.encrypt(nonce, bytes(self._buffer), _PLACE.pack(self._pieces, last))
        self._file.write(_LENGTH.pack(len(piece)))
        self._file.write(piece)
        self._buffer.clear()
        self._pieces += 1


def opened(data: bytes, key: str | None, name: str) -> bytes:
    """``data`` in clear: decrypted if it is encrypted, as it is otherwise.

    Args:
        key: the person's key; None: that of the environment variable, if any.
        name: of the file, for messages.

    Raises:
        WrongKeyError: the key is missing or wrong.
        CheckpointError: the file was cut or changed.
    """
    if not is_encrypted(data):
        return data
    key = key or os.environ.get(ENVIRONMENT)
    if not key:
        raise WrongKeyError(f"{name}: it is encrypted; give its key in the environment variable {ENVIRONMENT}")
    return b"".join(_pieces(data, key, name))


def _pieces(data: bytes, key: str, name: str) -> Iterator[bytes]:
    from cryptography.exceptions import InvalidTag

    view = memoryview(data)
    start = len(MAGIC) + _SALT_BYTES
    cipher = _cipher(key, bytes(view[len(MAGIC) : start]))
    number = 0
    while True:
        begin = start + _LENGTH.size
        if begin > len(view):
            raise CheckpointError(f"{name}: the encrypted file ends too early: it was cut; use another copy")
        (length,) = _LENGTH.unpack(view[start:begin])
        sealed, last = view[begin : begin + length], begin + length >= len(view)
        try:
            yield cipher.decrypt(bytes(sealed[:_NONCE_BYTES]), sealed[_NONCE_BYTES:], _PLACE.pack(number, last))
        except (InvalidTag, ValueError) as error:
            if number == 0:
                raise WrongKeyError(
                    f"{name}: it cannot be decrypted: the key is wrong, or the file was changed"
                ) from error
            raise CheckpointError(f"{name}: it cannot be decrypted: the file was cut or changed") from error
        if last:
            return
        start, number = begin + length, number + 1


def _cipher(key: str, salt: bytes):  # type: ignore[no-untyped-def]
    """AES-GCM with the key derived from the person's: scrypt, about 50 ms and 32 MB."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return AESGCM(Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive(key.encode()))
