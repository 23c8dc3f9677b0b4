"""From logits to masks: the probabilities of a box's pixels, their threshold, the RLE (METHOD section 5).

Bilinear to the crop, sigmoid, times box mask, bilinear to the window, threshold: every step for the pixels that the
box's pixels depend on, and no other. Nothing is the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mal import masks
from mal.boxes import Window

STABILITY_OFFSET = 1.0
"""The stability of a mask is measured between thresholds this much above and below its own, in logits."""
STRIP_PIXELS = 1 << 22
"""Probabilities of one box are held for at most about this many pixels at a time."""


class MaskResult(NamedTuple):
    """The mask of one box."""

    counts: str  # compressed COCO RLE of the image-sized mask
    area: int  # mask pixels
    mean_probability: float  # of the mask's pixels, 0..1; 0 for an empty mask
    stability: float  # IoU of the masks at a stricter and at a laxer threshold (`STABILITY_OFFSET`); 0 for an empty one
    bounds: Window | None = None  # the smallest that holds the mask; None for an empty one
    agreement: float | None = None  # of the networks and mirrored views, 0..1, if there are several (`agreement`)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the mask of one crop belongs."""

    window: Window
    pixels: Window  # the box rounded outwards: no mask pixel outside
    rows: NDArray[np.uint8]  # box mask of the crop = rows x columns, each [S], 0 or 1
    columns: NDArray[np.uint8]
    height: int  # of the image
    width: int
    threshold: float


@torch.no_grad()
def paste(views: Sequence[tuple[Tensor, Sequence[Placement]]]) -> list[MaskResult]:
    """The masks of boxes, cut by each box rounded outwards. The device is waited for once.

    Args:
        views: logits ``[B, h, w]`` with the placements of their crops; several for several windows around the same
            boxes, whose probabilities are averaged.
    """
    device = views[0][0].device
    axes = [_axes(place, *logits.shape[1:]) for logits, places in views for place in places]
    vectors = _to_device([axis for pair in axes for axis in pair], device)
    placements = views[0][1]
    pieces: list[Tensor] = []
    sums: list[Tensor] = []
    for i, place in enumerate(placements):
        chosen = [2 * (v * len(placements) + i) for v in range(len(views))]
        opinions = [_strips(views[v][0][i], vectors[k], vectors[k + 1]) for v, k in enumerate(chosen)]
        strips = [_measured(_mean(probabilities), place.threshold) for probabilities in zip(*opinions, strict=True)]
        pieces += [mask.flatten() for mask, _ in strips]
        sums.append(torch.stack([total for _, total in strips]).sum(0))
    return list(_encode(torch.cat(pieces).cpu().numpy(), torch.stack(sums).tolist(), placements))


def _mean(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.stack(list(maps)).mean(0)


class _Axis(NamedTuple):
    """One axis of one box: ``p`` pixels of the box depend on ``n`` of the crop's, and those on the logits.

    Both steps are linear interpolations between two neighbours, as in ``F.interpolate(mode="bilinear")``.
    """

    low: Tensor  # [n] index of each crop pixel's first logit
    high: Tensor  # [n] and of its second
    share: Tensor  # [n] weight of the second; the first has the rest
    crop_low: Tensor  # [p] index of each box pixel's first crop pixel, among the n
    crop_high: Tensor  # [p] and of its second
    weight_low: Tensor  # [p] weight of the first times its box mask
    weight_high: Tensor  # [p] and of the second


def _axis(first: int, stop: int, length: int, box_mask: NDArray[np.uint8], logits: int) -> _Axis:
    """The interpolations for pixels ``first..stop`` of a window of ``length``; its crop has ``box_mask``'s length."""
    size = len(box_mask)
    low, high, share = _neighbours(np.arange(first, stop), size, length)
    needed = np.zeros(size, dtype=bool)
    needed[low] = needed[high] = True
    rank = np.cumsum(needed) - 1
    logit_low, logit_high, logit_share = _neighbours(np.flatnonzero(needed), logits, size)
    weight_low, weight_high = (1 - share) * box_mask[low], share * box_mask[high]
    indices = (logit_low, logit_high, rank[low], rank[high])
    a, b, c, d = (torch.from_numpy(index) for index in indices)
    u, v, w = (torch.from_numpy(weight.astype(np.float32)) for weight in (logit_share, weight_low, weight_high))
    return _Axis(a, b, u, c, d, v, w)


def _axes(place: Placement, logits_height: int, logits_width: int) -> tuple[_Axis, _Axis]:
    """Rows and columns of one box."""
    window, pixels = place.window, place.pixels
    rows = _axis(pixels.y0 - window.y0, pixels.y1 - window.y0, window.height, place.rows, logits_height)
    columns = _axis(pixels.x0 - window.x0, pixels.x1 - window.x0, window.width, place.columns, logits_width)
    return rows, columns


def _neighbours(
    position: NDArray[np.int64], source: int, target: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Bilinear resize of ``source`` values to ``target``: the two sources of each position, and the second's weight.

    Pixel centres lie at half-integers and borders are repeated (``align_corners=False``).
    """
    centre = np.maximum((position + 0.5) * (source / target) - 0.5, 0.0)
    low = np.minimum(centre.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), centre - low


def _to_device(axes: Sequence[_Axis], device: torch.device) -> list[_Axis]:
    """All vectors in two transfers."""
    if device.type == "cpu":
        return list(axes)
    flat = [tensor for axis in axes for tensor in axis]
    moved: dict[int, Tensor] = {}
    for floating in (False, True):
        chosen = [i for i, tensor in enumerate(flat) if tensor.is_floating_point() == floating]
        together = torch.cat([flat[i] for i in chosen]).to(device)
        moved |= zip(chosen, together.split([len(flat[i]) for i in chosen]), strict=True)
    fields = len(_Axis._fields)
    return [_Axis(*(moved[i] for i in range(start, start + fields))) for start in range(0, len(flat), fields)]


def _strips(logits: Tensor, rows: _Axis, columns: _Axis) -> Iterator[Tensor]:
    """The probabilities of the box's pixels, some columns at a time: ``[columns, rows]``, as RLEs run down columns.

    Rows are interpolated by copying whole rows, which is fast, and columns as the rows of the transposed map. The box
    mask is a product of rows and columns, so it is part of the second interpolation's weights.
    """
    across = _interpolate(logits.t(), columns)  # [n columns, logits]
    crop = _interpolate(across.t(), rows).sigmoid_()  # [n rows, n columns]
    down = _interpolate_masked(crop, rows.crop_low, rows.crop_high, rows.weight_low, rows.weight_high).t().contiguous()
    step = max(1, STRIP_PIXELS // down.shape[1])
    strips = zip(*(vector.split(step) for vector in columns[3:]), strict=True)
    for crop_low, crop_high, weight_low, weight_high in strips:
        yield _interpolate_masked(down, crop_low, crop_high, weight_low, weight_high)


def _measured(probability: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The mask of some pixels, and ``[3]``: the sum of the mask's probabilities, and the pixels above a stricter and
    above a laxer threshold.
    """
    total = F.threshold(probability, threshold, 0.0).sum()
    if probability.device.type == "cpu":  # numpy compares and counts seven times faster than torch
        values = probability.numpy()
        above = [float(np.count_nonzero(values > other)) for other in stability_thresholds(threshold)]
        return torch.from_numpy(values > threshold), torch.tensor([float(total), *above], dtype=torch.float64)
    counts = [torch.count_nonzero(probability > other) for other in stability_thresholds(threshold)]
    return probability > threshold, torch.stack([total.double(), *counts])


def _interpolate(values: Tensor, axis: _Axis) -> Tensor:
    """Logits ``[l, m]`` to the needed crop pixels ``[n, m]``."""
    return torch.lerp(values.index_select(0, axis.low), values.index_select(0, axis.high), axis.share[:, None])


def _interpolate_masked(values: Tensor, low: Tensor, high: Tensor, weight_low: Tensor, weight_high: Tensor) -> Tensor:
    """Probabilities ``[n, m]`` of the crop to the box's pixels ``[p, m]``."""
    first = values.index_select(0, low).mul_(weight_low[:, None])
    return first.addcmul_(values.index_select(0, high), weight_high[:, None])


def stability_thresholds(threshold: float) -> tuple[float, float]:
    """The stricter and the laxer threshold around one in [0, 1)."""
    logit = math.log(max(threshold, 1e-3) / (1 - max(threshold, 1e-3)))
    strict, lax = (1 / (1 + math.exp(-(logit + offset))) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return strict, lax


def _encode(
    packed: NDArray[np.bool_], totals: Sequence[Sequence[float]], places: Sequence[Placement]
) -> Iterator[MaskResult]:
    """RLEs from the masks of all boxes, one after the other, each in column-major order."""
    start = 0
    for place, (total, strict, lax) in zip(places, totals, strict=True):
        pixels = place.pixels
        stop = start + pixels.width * pixels.height
        mask = packed[start:stop].reshape(pixels.width, pixels.height).T
        start = stop
        count = int(np.count_nonzero(mask))
        counts, bounds = masks.encode_bounded(mask, pixels, place.height, place.width)
        mean = total / count if count else 0.0
        # Of a threshold near 0 the "laxer" one is above it: there may be a mask without a pixel that is above both.
        stability = strict / lax if count and lax else 0.0
        yield MaskResult(counts, count, mean, stability, bounds)
