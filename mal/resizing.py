"""Antialiased bicubic resize of crops on CPUs: `mal.crops.resize` to the bit, compiled by numba, several times faster.

Without numba it is `mal.crops.resize` itself.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from mal import crops
from mal.crops import IMAGENET_MEAN, IMAGENET_STD

_LOG = logging.getLogger(__name__)

ROWS = 64
"""Rows of a window that are filtered at a time: they stay in the cache, and large windows are not copied whole."""
_SCALE = np.array([1 / (255 * std) for std in IMAGENET_STD], np.float32)
_OFFSET = np.array([-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], np.float32)


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """``[h, w, 3]`` to ``[size, size, 3]``, what Pillow gives, in memory of any order."""
    loops = _compiled()
    if loops is None:
        return crops.resize(np.ascontiguousarray(pixels), size)
    planes = _filtered_along_rows(loops, pixels, size)
    resized = np.empty((3, size, size), np.uint8)
    loops.filter_planes(planes, *loops.filter_weights(planes.shape[1], size), resized)
    return resized.transpose(1, 2, 0)


def resize_normalised(pixels: NDArray[np.uint8], size: int, out: NDArray[np.float32]) -> None:
    """`resize`, then ImageNet's mean to 0 and deviation to 1, into ``out`` ``[3, size, size]``."""
    loops = _compiled()
    if loops is None:
        planes = crops.resize(np.ascontiguousarray(pixels), size).transpose(2, 0, 1)
        np.multiply(planes, _SCALE[:, None, None], out=out)
        out += _OFFSET[:, None, None]
        return
    planes = _filtered_along_rows(loops, pixels, size)
    loops.filter_planes_normalised(planes, *loops.filter_weights(planes.shape[1], size), _SCALE, _OFFSET, out)


@functools.cache
def _compiled() -> ModuleType | None:
    """The compiled loops, if numba can be had here."""
    try:
        from mal import resizing_compiled
    except (ImportError, RuntimeError, OSError) as error:  # no numba, none for this numpy, nowhere to keep its results
        _LOG.info("crops are resized by Pillow, several times slower than compiled by numba: %s", error)
        return None
    return resizing_compiled


def _filtered_along_rows(loops: ModuleType, pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Planes ``[3, h, size]``; ``[3, size, size]`` where Pillow filters the columns first (`crops.vertical_first`).

    The loops add up whole rows of bytes, so along rows they work on the transposed pixels.
    """
    height, width = pixels.shape[:2]
    if crops.vertical_first(height, width, size):
        flat = np.ascontiguousarray(pixels).reshape(1, height, 3 * width)
        down = np.empty((1, size, 3 * width), np.uint8)
        loops.filter_planes(flat, *loops.filter_weights(height, size), down)
        pixels, height = down.reshape(size, width, 3), size
    weights = loops.filter_weights(width, size)
    planes = np.empty((3, height, size), np.uint8)
    for row in range(0, height, ROWS):
        strip = np.array(pixels[row : row + ROWS].transpose(1, 2, 0), order="C")  # [w, 3, rows]
        across = np.empty((size, *strip.shape[1:]), np.uint8)
        loops.filter_planes(strip.reshape(1, width, -1), *weights, across.reshape(1, size, -1))
        planes[:, row : row + ROWS] = across.transpose(1, 2, 0)
    return planes
