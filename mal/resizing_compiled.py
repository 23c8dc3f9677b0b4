"""The loops of `mal.resizing`, compiled by numba: Pillow's resampling along one axis, in the same whole numbers.

Pillow (``src/libImaging/Resample.c``) turns the weights of its bicubic filter (a = -0.5, widened by the scale where
pixels are lost) into whole numbers with 22 bits after the point, adds up in 32 bits, rounds and cuts to a byte.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types

_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
_SHIFT, _BLACK, _WHITE = np.int32(_BITS), np.int32(0), np.int32(255)

_BYTES = types.Array(types.uint8, 3, "C")
_FLOATS = types.Array(types.float32, 3, "C")
_VECTOR = types.Array(types.float32, 1, "C")
_STARTS = types.Array(types.int64, 1, "C")
_WEIGHTS = types.Array(types.int32, 2, "C")


@njit(error_model="numpy", nogil=True)
def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@njit(types.Tuple((_STARTS, _STARTS, _WEIGHTS))(types.int64, types.int64), error_model="numpy", nogil=True, cache=True)
def filter_weights(length: int, size: int) -> Any:
    """What each of ``size`` values takes of ``length``: first source and count ``[size]``, weights ``[size, n]``."""
    scale = length / size
    widened = max(scale, 1.0)
    support = 2.0 * widened
    taps = 2 * math.ceil(support) + 1
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights, exact = np.zeros((size, taps), np.int32), np.empty(taps, np.float64)
    for i in range(size):
        centre = (i + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        n = min(int(centre + support + 0.5), length) - start
        total = 0.0
        for k in range(n):
            exact[k] = _bicubic((k + start - centre + 0.5) * (1.0 / widened))
            total += exact[k]
        for k in range(n):
            share = exact[k] / total * (1 << _BITS)
            weights[i, k] = int(share - 0.5) if share < 0 else int(share + 0.5)
        first[i], count[i] = start, n
    return first, count, weights


@njit(error_model="numpy", nogil=True)
def _add_up(rows: Any, first: int, count: int, weights: Any, sums: Any) -> None:
    """The weighted sum of ``count`` rows, four at a time."""
    sums[:] = _HALF
    k = 0
    while k + 4 <= count:
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        p, q, r, s = rows[first + k], rows[first + k + 1], rows[first + k + 2], rows[first + k + 3]
        for x in range(len(sums)):
            sums[x] += a * np.int32(p[x]) + b * np.int32(q[x]) + c * np.int32(r[x]) + d * np.int32(s[x])
        k += 4
    while k < count:
        a, p = weights[k], rows[first + k]
        for x in range(len(sums)):
            sums[x] += a * np.int32(p[x])
        k += 1


@njit(types.void(_BYTES, _STARTS, _STARTS, _WEIGHTS, _BYTES), error_model="numpy", nogil=True, cache=True)
def filter_planes(planes: Any, first: Any, count: Any, weights: Any, out: Any) -> None:
    """``[P, l, m]`` to ``[P, n, m]`` by the `filter_weights` for ``l`` and ``n``."""
    sums = np.empty(planes.shape[2], np.int32)
    for plane in range(len(out)):
        for i in range(out.shape[1]):
            _add_up(planes[plane], first[i], count[i], weights[i], sums)
            line = out[plane, i]
            for x in range(len(sums)):
                line[x] = np.uint8(min(max(sums[x] >> _SHIFT, _BLACK), _WHITE))


@njit(
    types.void(_BYTES, _STARTS, _STARTS, _WEIGHTS, _VECTOR, _VECTOR, _FLOATS),
    error_model="numpy", nogil=True, cache=True,
)  # fmt: skip
def filter_planes_normalised(
    planes: Any, first: Any, count: Any, weights: Any, scale: Any, offset: Any, out: Any
) -> None:
    """`filter_planes`, then each plane times its ``scale`` plus its ``offset``, as floats."""
    sums = np.empty(planes.shape[2], np.int32)
    for plane in range(len(out)):
        for i in range(out.shape[1]):
            _add_up(planes[plane], first[i], count[i], weights[i], sums)
            line = out[plane, i]
            for x in range(len(sums)):
                line[x] = np.float32(min(max(sums[x] >> _SHIFT, _BLACK), _WHITE)) * scale[plane] + offset[plane]
