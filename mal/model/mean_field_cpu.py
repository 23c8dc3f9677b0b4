"""The mean field on CPUs: one compiled loop per image (numba), with its own vectorised logarithm and exponential.

A map is laid out flat, with ``reach`` unused pixels behind every row and unused rows around it: a neighbour is then a
fixed distance away, and long runs of pixels are computed without asking where a row ends. The affinity to and from
unused pixels is 0, so what stands there does not matter. An iteration goes over the map in pieces that stay in the
processor's first cache.

Only `mal.model.mean_field` calls this; it falls back to plain torch where numba is missing.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

PIECE = 1024
"""Pixels that are computed at a time: their sums take 8 KiB."""

_F, _I = ir.FloatType(), ir.IntType(32)
_ONE, _HALF, _EPSILON = np.float32(1.0), np.float32(0.5), np.float32(1e-6)
_LEAST = np.float32(-125.0)  # 2^-125 is the least power used: nothing beside the epsilon of the formula
_ROUND = np.float32(1.5 * 2**23)  # added to a small number, it leaves the nearest whole number in the lowest bits
# log2(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1] and 2^f for f in [-1/2, 1/2]: minimax polynomials, of relative
# errors 2.6e-8 and 1.9e-9, lowest power first.
_L = [np.float32(c) for c in (1.4426950036522934, -0.72134734681987, 0.4809106429831232, -0.36070368138468356)]
_L += [np.float32(c) for c in (0.2879162455974462, -0.2389448520901267, 0.21571566263597824, -0.2072695555950315)]
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (*_L, np.float32(0.12583662922202632))
_E = [np.float32(c) for c in (1.000000000554172, 0.6931472057372517, 0.24022646890595678, 0.05550328776992335)]
_E += [np.float32(c) for c in (0.009618488961295515, 0.0013399931210939552, 0.00015345810885380204)]
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = _E


@intrinsic
def _exponent(_: Any, x: Any) -> Any:
    """Of float32 ``x = 2^e * m``, m in [sqrt(1/2), sqrt(2)): e, as a float32. Positive normal numbers only."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.sub(builder.bitcast(args[0], _I), ir.Constant(_I, 0x3F3504F3))
        return builder.sitofp(builder.ashr(bits, ir.Constant(_I, 23)), _F)

    return types.float32(types.float32), generate


@intrinsic
def _mantissa(_: Any, x: Any) -> Any:
    """The m of `_exponent`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I)
        exponent = builder.and_(builder.sub(bits, ir.Constant(_I, 0x3F3504F3)), ir.Constant(_I, -(1 << 23)))
        return builder.bitcast(builder.sub(bits, exponent), _F)

    return types.float32(types.float32), generate


@intrinsic
def _power(_: Any, shifted: Any) -> Any:
    """2^n as float32, of the float32 ``n + _ROUND``; n in -126..127."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[0], _I), ir.Constant(_I, 23))
        return builder.bitcast(builder.add(bits, ir.Constant(_I, 0x3F800000)), _F)

    return types.float32(types.float32), generate


@njit(fastmath={"contract"}, error_model="numpy")
def _log2(x: Any) -> Any:
    f = _mantissa(x) - _ONE  # type: ignore[call-arg]
    p = _L4 + f * (_L5 + f * (_L6 + f * (_L7 + f * _L8)))
    return _exponent(x) + f * (_L0 + f * (_L1 + f * (_L2 + f * (_L3 + f * p))))


@njit(fastmath={"contract"}, error_model="numpy")
def _exp2(x: Any) -> Any:
    x = x if x > _LEAST else _LEAST
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
    return p * _power(shifted)  # type: ignore[call-arg]


# The loops below are functions of their own, with few arrays each: so LLVM can tell that no two of them overlap, and
# vectorises. `sums` holds the sums of log(1 - q) in its first half and those of log(q) in its second.


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _start(sums: Any, log_not_q: Any, log_q: Any) -> None:
    for i in range(len(log_q)):
        sums[i] = log_not_q[i]  # the pixel itself: K_ii = 1
        sums[PIECE + i] = log_q[i]


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _add(sums: Any, affinity: Any, log_not_q: Any, log_q: Any) -> None:
    for i in range(len(log_q)):
        sums[i] += affinity[i] * log_not_q[i]
        sums[PIECE + i] += affinity[i] * log_q[i]


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _close(q: Any, sums: Any, box: Any, low: Any, high: Any) -> None:
    for i in range(len(q)):
        a0 = _exp2(sums[i])
        a1 = _exp2(sums[PIECE + i]) * box[i]
        value = a1 / (_EPSILON + a0 + a1)
        value = value if value > low else low
        q[i] = value if value < high else high


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _logs(log_not_q: Any, log_q: Any, q: Any) -> None:
    for i in range(len(q)):
        log_not_q[i] = _log2(_ONE - q[i])
        log_q[i] = _log2(q[i])


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _similar(affinity: Any, here: Any, there: Any, scale: Any) -> None:
    """``affinity += scale * (here - there)^2``: the exponent of the affinity, channel by channel."""
    for i in range(len(affinity)):
        difference = here[i] - there[i]
        affinity[i] += scale * difference * difference


@njit(fastmath={"contract"}, error_model="numpy", nogil=True)
def _affinities(image: Any, reach: int, scale: Any) -> Any:
    """``[neighbours, flat map]`` and the neighbours' distances, for one half of the neighbourhood.

    0 where the pixel or its neighbour lies outside the image. ``image``: [C, H, W]. ``scale``: -log2(e) / (2 zeta^2).
    """
    channels, height, width = image.shape
    stride = width + reach
    margin = reach * stride + reach
    half = 2 * reach * (reach + 1)
    affinities = np.zeros((half, 2 * margin + height * stride), np.float32)
    distances = np.zeros(half, np.int64)
    place = 0
    for dy in range(reach + 1):
        for dx in range(-reach if dy else 1, reach + 1):
            distances[place] = dy * stride + dx
            first, last = max(0, -dx), width - max(0, dx)
            for y in range(height - dy if last > first else 0):
                begin = margin + y * stride
                row = affinities[place, begin + first : begin + last]
                for c in range(channels):
                    _similar(row, image[c, y, first:last], image[c, y + dy, first + dx : last + dx], scale)
                for i in range(len(row)):
                    row[i] = _exp2(row[i])
            place += 1
    return affinities, distances


@njit(
    "float32[:,::1](float32[:,:,::1], float32[:,::1], float32[:,::1], int64, float32, int64, float32, float32)",
    fastmath={"contract"},
    error_model="numpy",
    nogil=True,
    cache=True,
)
def _refined(
    image: Any, probabilities: Any, box_mask: Any, reach: int, scale: Any, iterations: int, low: Any, high: Any
) -> Any:
    """The mean field of one image: [C, H, W], [H, W] (times the box already) and [H, W] -> [H, W]."""
    height, width = probabilities.shape
    affinities, distances = _affinities(image, reach, scale)
    stride = width + reach
    margin = reach * stride + reach
    length = affinities.shape[1]
    q, box = np.full(length, _HALF, np.float32), np.zeros(length, np.float32)
    for y in range(height):
        begin = margin + y * stride
        for x in range(width):
            value = probabilities[y, x]
            value = value if value > low else low
            q[begin + x] = value if value < high else high
            box[begin + x] = box_mask[y, x]
    logs = np.zeros((2, 2, length), np.float32)
    _logs(logs[0, 0], logs[0, 1], q)
    sums = np.empty(2 * PIECE, np.float32)
    for iteration in range(iterations):
        log_not_q, log_q = logs[iteration % 2, 0], logs[iteration % 2, 1]
        into = logs[1 - iteration % 2]
        for a in range(margin, length - margin, PIECE):
            b = min(a + PIECE, length - margin)
            _start(sums, log_not_q[a:b], log_q[a:b])
            for place in range(len(distances)):
                d = distances[place]
                _add(sums, affinities[place, a:b], log_not_q[a + d : b + d], log_q[a + d : b + d])
                _add(sums, affinities[place, a - d : b - d], log_not_q[a - d : b - d], log_q[a - d : b - d])
            _close(q[a:b], sums, box[a:b], low, high)
            _logs(into[0, a:b], into[1, a:b], q[a:b])
    found = np.empty((height, width), np.float32)
    for y in range(height):
        begin = margin + y * stride
        found[y] = q[begin : begin + width]
    return found


def fused(
    image: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    box_mask: NDArray[np.float32] | None,
    *,
    kernel_size: int,
    zeta: float,
    iterations: int,
    low: float,
    high: float,
    threads: int,
) -> NDArray[np.float32]:
    """As `mal.model.mean_field.mean_field`, in numpy: [B, C, H, W], [B, H, W], [B, H, W] -> [B, H, W].

    Args:
        low, high: ``0 < low <= high < 1``: the logarithm is one of positive numbers only.
        threads: images that are computed at the same time.
    """
    image = np.ascontiguousarray(image, np.float32)
    probabilities = np.ascontiguousarray(probabilities, np.float32)
    if box_mask is not None:
        probabilities = probabilities * box_mask
    box = np.ones_like(probabilities) if box_mask is None else np.ascontiguousarray(box_mask, np.float32)
    scale = np.float32(-math.log2(math.e) / (2.0 * zeta**2))
    options = (kernel_size // 2, scale, iterations, np.float32(low), np.float32(high))

    def one(place: int) -> NDArray[np.float32]:
        return _refined(image[place], probabilities[place], box[place], *options)

    places = range(len(image))
    if threads > 1 and len(places) > 1:
        with ThreadPoolExecutor(min(threads, len(places))) as pool:
            found = list(pool.map(one, places))
    else:
        found = [one(place) for place in places]
    return np.stack(found) if found else probabilities
