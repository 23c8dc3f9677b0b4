"""The mean field on GPUs: a Triton kernel that does several iterations before anything leaves the processor.

A program computes one square window of a map. Within a launch it exchanges with nobody: the outer ``reach`` pixels of
its window become wrong with every iteration, so after ``sweeps`` of them all but a rim of ``sweeps * reach`` pixels are
right, and only those are written. Windows overlap by that rim. The logarithms that neighbours read go through a
scratch area of the program's own, small enough for its first cache. Affinities are symmetric: half of them are stored.

Not run on a GPU so far, only in Triton's interpreter (tests/model/test_mean_field_gpu.py), which checks what is
computed, but neither speed nor the barrier. Only `mal.model.mean_field` calls this.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW = 64
"""Side of a program's window in pixels, a power of two: its logarithms, twice, and affinities take 128 KiB (k = 3)."""
RIM = 8
"""Pixels that may be given up on every side of a window, unless the neighbourhood reaches further."""
MOST_REACH = 15
"""Pixels that a neighbourhood may reach; a kernel of 31."""


@triton.jit
def _similar(image, affinities, height, width, scale, CHANNELS: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Affinities of one half of the neighbourhood: [B, C, H, W] -> [B, half, H, W]; 0 where one of both is outside."""
    half: tl.constexpr = 2 * REACH * (REACH + 1)
    area = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    y, x = pixel // width, pixel % width
    inside = pixel < area
    for dy in tl.static_range(0, REACH + 1):
        for dx in tl.static_range(-REACH, REACH + 1):
            if dy > 0 or dx > 0:
                both = inside & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
                distance = tl.zeros([BLOCK], tl.float32)
                for channel in tl.static_range(CHANNELS):
                    plane = image + (batch * CHANNELS + channel) * area + pixel
                    here = tl.load(plane, mask=both, other=0.0)
                    difference = here - tl.load(plane + dy * width + dx, mask=both, other=0.0)
                    distance += difference * difference
                target = affinities + (batch * half + dy * (2 * REACH + 1) + dx - 1) * area + pixel
                tl.store(target, tl.where(both, tl.exp2(distance * scale), 0.0), mask=inside)


@triton.jit
def _sweep(
    before,
    after,
    box_mask,
    affinities,
    scratch,
    height,
    width,
    columns_of_windows,
    sweeps,
    low,
    high,
    REACH: tl.constexpr,  # noqa: N803
    SIDE: tl.constexpr,  # noqa: N803
    EDGE: tl.constexpr,  # noqa: N803
    BOXED: tl.constexpr,  # noqa: N803
):
    """``sweeps`` iterations (at most EDGE / REACH) of one window: probabilities [B, H, W] -> [B, H, W]."""
    inner: tl.constexpr = SIDE - 2 * EDGE
    half: tl.constexpr = 2 * REACH * (REACH + 1)
    area = height * width
    window, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    y = (window // columns_of_windows) * inner - EDGE + row
    x = (window % columns_of_windows) * inner - EDGE + column
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel, cell = y * width + x, row * SIDE + column
    q = tl.load(before + batch * area + pixel, mask=inside, other=0.5)
    own = scratch + (batch * tl.num_programs(0) + window) * (4 * SIDE * SIDE)
    for sweep in range(sweeps):
        # Two areas in turn, so that one barrier is enough: nobody writes where another may still be reading.
        logs_not_q = own + (sweep % 2) * (2 * SIDE * SIDE)
        logs_q = logs_not_q + SIDE * SIDE
        sum_not_q, sum_q = tl.log2(1.0 - q), tl.log2(q)  # the pixel itself: K_ii = 1
        tl.store(logs_not_q + cell, sum_not_q)
        tl.store(logs_q + cell, sum_q)
        tl.debug_barrier()
        for dy in tl.static_range(0, REACH + 1):
            for dx in tl.static_range(-REACH, REACH + 1):
                if dy > 0 or dx > 0:
                    plane = affinities + (batch * half + dy * (2 * REACH + 1) + dx - 1) * area + pixel
                    step: tl.constexpr = dy * SIDE + dx
                    known = (row + dy < SIDE) & (column + dx >= 0) & (column + dx < SIDE)
                    affinity = tl.load(plane, mask=inside & known, other=0.0)
                    sum_not_q += affinity * tl.load(logs_not_q + cell + step, mask=known, other=0.0)
                    sum_q += affinity * tl.load(logs_q + cell + step, mask=known, other=0.0)
                    known = (row - dy >= 0) & (column - dx >= 0) & (column - dx < SIDE)
                    there = inside & known & (y - dy >= 0) & (x - dx >= 0) & (x - dx < width)
                    affinity = tl.load(plane - dy * width - dx, mask=there, other=0.0)
                    sum_not_q += affinity * tl.load(logs_not_q + cell - step, mask=known, other=0.0)
                    sum_q += affinity * tl.load(logs_q + cell - step, mask=known, other=0.0)
        a0, a1 = tl.exp2(sum_not_q), tl.exp2(sum_q)
        if BOXED:
            a1 *= tl.load(box_mask + batch * area + pixel, mask=inside, other=0.0)
        q = tl.minimum(tl.maximum(a1 / (1e-6 + a0 + a1), low), high)
    right = (row >= EDGE) & (row < SIDE - EDGE) & (column >= EDGE) & (column < SIDE - EDGE)
    tl.store(after + batch * area + pixel, q, mask=inside & right)


def tiled(
    image: Tensor,
    probabilities: Tensor,
    box_mask: Tensor | None,
    *,
    kernel_size: int,
    zeta: float,
    iterations: int,
    low: float,
    high: float,
    window: int = WINDOW,
) -> Tensor:
    """As `mal.model.mean_field.mean_field`; all on one GPU (on the CPU in Triton's interpreter).

    Args:
        kernel_size: odd, at least 3; it reaches at most MOST_REACH pixels, and less than half a window.
        low, high: ``0 < low <= high < 1``.
        window: side of a program's window, a power of two.
    """
    reach = kernel_size // 2
    sweeps = max(1, min(RIM, window // 4) // reach)
    edge = sweeps * reach
    assert 1 <= reach <= MOST_REACH, f"a kernel of {kernel_size}"
    assert 2 * edge < window, f"a kernel of {kernel_size} in windows of {window}"
    batch, channels, height, width = image.shape
    image = image.float().contiguous()
    box = None if box_mask is None else box_mask.float().contiguous()
    q = (probabilities.float() if box is None else probabilities.float() * box).clamp(low, high).contiguous()
    affinities = q.new_empty(batch, 2 * reach * (reach + 1), height, width)
    scale, block = -math.log2(math.e) / (2.0 * zeta**2), 256
    _similar[(triton.cdiv(height * width, block), batch)](
        image, affinities, height, width, scale, CHANNELS=channels, REACH=reach, BLOCK=block
    )
    rows, columns = (triton.cdiv(side, window - 2 * edge) for side in (height, width))
    scratch = q.new_empty(batch * rows * columns * 4 * window * window)
    other = torch.empty_like(q)
    for done in range(0, iterations, sweeps):
        _sweep[(rows * columns, batch)](
            q,
            other,
            q if box is None else box,
            affinities,
            scratch,
            height,
            width,
            columns,
            min(sweeps, iterations - done),
            low,
            high,
            REACH=reach,
            SIDE=window,
            EDGE=edge,
            BOXED=box is not None,
            num_warps=16 if window >= WINDOW else 4,
        )
        q, other = other, q
    return q
