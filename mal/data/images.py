"""Reads one image file as RGB pixels, safely: names that leave the folder, bombs, broken files, odd kinds of pixels."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import posixpath
import re
import socket
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mal import storage
from mal.errors import MalError, StorageError
from mal.rows import REASONS

SUSPICIOUS_NAME = r"^[/\\]|^[A-Za-z]:|\.\.|://|\x00"
"""Names that match need a closer look (`leaves_folder`); a regular expression for Python and for Arrow alike."""

_TRANSPOSE = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientations that swap width and height -> what puts the picture upright."""

_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError),
    *(struct.error, zlib.error),
)
"""What Pillow's decoders raise on damaged files."""


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a local file is tried again after one of the next errors."""
_DAMAGED_DISK = {errno.EIO, errno.ESTALE}
"""What stays of these, where the folder can be listed, is the file's own fault."""
_PASSING = _DAMAGED_DISK | {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ENODEV, errno.ENXIO),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
"""Errors of the machine or its network, which may pass."""


class ImageError(MalError):
    """An image cannot be used. ``code`` is one of `mal.rows.REASONS`, ``reason`` is ``code: detail``."""

    def __init__(self, code: str, detail: str) -> None:
        assert code in REASONS, code
        self.code = code
        self.detail = detail
        super().__init__(code, detail)

    @property
    def reason(self) -> str:
        """The text for the ledger."""
        return f"{self.code}: {self.detail}"

    def __str__(self) -> str:
        return f"{REASONS[self.code]}: {self.detail}"


def leaves_folder(file_name: str) -> bool:
    """Whether a name, joined to a folder, may name something outside it: absolute, a URI, a drive, or too many ``..``.

    Backslashes count as separators, as they do where some data sets were made.
    """
    if re.search(SUSPICIOUS_NAME, file_name) is None:
        return False
    if re.search(r"^[/\\]|^[A-Za-z]:|://|\x00", file_name):
        return True
    steps = posixpath.normpath(file_name.replace("\\", "/"))
    return steps == ".." or steps.startswith("../")


def safe_join(img_dir: str, file_name: str) -> str:
    """The path of an image. Names are taken as they are: no URL decoding, no expansion.

    Raises:
        ImageError: ``unsafe_path``, if the name leaves ``img_dir``, on a local disk also through a symbolic link.
    """
    if not file_name or leaves_folder(file_name):
        raise ImageError("unsafe_path", repr(file_name))
    path = storage.join(img_dir, file_name)
    local = storage.local_path(path)
    if local is not None:
        folder = storage.local_path(img_dir)
        assert folder is not None
        if not local.resolve().is_relative_to(folder.resolve()):
            raise ImageError("unsafe_path", f"{file_name!r} is a link that leaves the image folder")
    return path


def decode(
    path: str, *, expected: tuple[int, int] | None = None, max_pixels: int, folder: str | None = None
) -> NDArray[np.uint8]:
    """Read an image as RGB.

    Greyscale is repeated, palettes are looked up, CMYK and the other colour spaces of Pillow are converted, 16-bit and
    floating-point values are scaled to 8 bits (not clipped), the alpha channel is dropped (what counts are the colours
    under it), of an animation the first frame counts.

    A COCO box is in the pixels of its record's size. Where the stored pixels have this size they are taken as they are;
    where only the picture turned upright by its EXIF orientation has it, it is turned; where both have it (a square, or
    a half turn) or nothing is expected, the stored pixels are taken, as COCO's own tools do.

    Args:
        path: local or remote.
        expected: (width, height) of the image's record.
        max_pixels: limit on width x height, checked before pixels are decoded.
        folder: of all images. Where a file cannot be read it is looked at as well: a folder that is not there on this
            node, or is empty, is no fault of the image.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: ``missing_image``, ``unreadable_image``, ``size_differs``, ``too_large``.
        StorageError: the storage fails for another reason.
    """
    data = _read(path, folder)
    with _quiet_pillow():
        try:
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                return _pixels(image, path, expected, max_pixels)
        except UnidentifiedImageError:
            raise ImageError("unreadable_image", f"{path}: {len(data)} bytes that are no known image") from None
        except MemoryError:
            raise ImageError("too_large", f"{path}: not enough memory to decode it") from None
        except _DAMAGE as error:
            raise ImageError("unreadable_image", f"{path}: {type(error).__name__}: {error}") from None


def _read(path: str, folder: str | None) -> bytes:
    local = storage.local_path(path) is not None
    for pause in (*_PAUSES, None):
        try:
            return storage.read_bytes(path)
        except StorageError as error:
            number = getattr(error.__cause__, "errno", None)
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                _look_at(folder)
                raise ImageError("missing_image", path) from None
            if not local:
                raise  # it was tried again; an object store out of reach is not the image's fault
            if number in _PASSING and pause is not None:
                time.sleep(pause)
                continue
            _look_at(folder)
            if number in _PASSING - _DAMAGED_DISK:
                raise
            raise ImageError("unreadable_image", str(error)) from None
    raise AssertionError("the last attempt returns or raises")


def _look_at(folder: str | None) -> None:
    """Raises StorageError if a local folder of images cannot be listed here, or is empty: a mount that is missing."""
    local = None if folder is None else storage.local_path(folder)
    if local is None:
        return
    try:
        with os.scandir(local) as entries:
            reason = "it is empty" if next(entries, None) is None else None
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason is not None:
        raise StorageError(
            f"{folder}: images cannot be read from this folder on node {socket.gethostname()}: {reason}. Is it mounted "
            "there? The run can be gone on with when it is"
        )


def _pixels(image: Image.Image, path: str, expected: tuple[int, int] | None, max_pixels: int) -> NDArray[np.uint8]:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{path}: {width} x {height} pixels, the limit is {max_pixels}")
    turn = None
    if expected is not None and image.size != tuple(expected):
        turn = _upright(image) if image.size == tuple(expected)[::-1] else None
        if turn is None:
            stated = f"{expected[0]} x {expected[1]}"
            raise ImageError("size_differs", f"{path}: it has {width} x {height} pixels, its record says {stated}")
    pixels = _rgb(image if turn is None else image.transpose(turn))
    if expected is not None and pixels.shape != (expected[1], expected[0], 3):
        raise ImageError("size_differs", f"{path}: decoded to {pixels.shape[1]} x {pixels.shape[0]} pixels")
    return pixels


def _upright(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright, if that swaps its sides; None without a usable EXIF orientation."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return None
    return _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any of Pillow's modes to uint8 [H, W, 3]."""
    grey: NDArray[Any]
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
    elif image.mode in ("I", "F"):
        grey = _scaled(np.asarray(image))
    else:
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode[:-1] + "A")
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    """32-bit values to 0..255: from 0..1 (floats) or 0..65535 where they fit, else from their own range."""
    whole = np.issubdtype(values.dtype, np.integer)
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    natural = 65535.0 if whole else 1.0
    if low >= 0 and high <= natural:
        low, high = 0.0, natural
    return np.rint((values - low) * (255.0 / (high - low if high > low else 1.0)))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: pictures of pixels, nothing that runs a program (EPS, WMF)."""
    Image.init()
    wanted = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX")
    return tuple(name for name in wanted if name in Image.OPEN)


class _QuietPillow:
    """While any thread decodes: Pillow's warnings are off, and its own limit on pixels, which `decode` replaces.

    Both are settings of the whole process, so the first thread in changes them and the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._warnings = warnings.catch_warnings()
        self._limit: int | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    Image.MAX_IMAGE_PIXELS = self._limit
                    self._warnings.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
