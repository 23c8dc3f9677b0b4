"""Arithmetic of boxes: clipping, area bands, and the window that is cut out around a box.

A *box* is ``(x0, y0, x1, y1)`` in pixels of the original image, real numbers; COCO's ``bbox`` is ``[x, y, w, h]``.
A *window* is ``(x0, y0, x1, y1)`` in whole pixels, right and bottom excluded, and may leave the image: there the
pixels wrap around (`mal.crops.cut`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BANDS = ("small", "medium", "large")
SMALL_UP_TO = 32.0**2
"""Box areas up to this are small (px^2)."""
MEDIUM_UP_TO = 96.0**2
"""Larger box areas up to this are medium (px^2), those above are large."""

SAME_OBJECT = 0.7
"""Two boxes of a larger IoU are taken for two of one object."""


class Box(NamedTuple):
    """Corners of a box in pixels of the original image."""

    x0: float
    y0: float
    x1: float
    y1: float


class Window(NamedTuple):
    """A rectangle of whole pixels, right and bottom excluded; may leave the image."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0


def from_xywh(bbox: Sequence[float]) -> Box:
    """COCO ``[x, y, w, h]`` to corners."""
    x, y, w, h = bbox
    return Box(float(x), float(y), float(x) + float(w), float(y) + float(h))


def overlaps(boxes: Sequence[Box]) -> list[float]:
    """By box the largest part of it, 0..1, that one of the other boxes covers.

    Boxes whose IoU with it is above `SAME_OBJECT` do not count: detectors find an object twice.
    """
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    areas = sides[:, 0] * sides[:, 1]
    found = []
    for i, box in enumerate(corners):
        common = np.minimum(corners[:, 2:], box[2:]) - np.maximum(corners[:, :2], box[:2])
        shared = np.maximum(common[:, 0], 0.0) * np.maximum(common[:, 1], 0.0)
        shared[shared > SAME_OBJECT * (areas + areas[i] - shared)] = 0.0  # the box itself, too
        found.append(float(shared.max() / areas[i]) if areas[i] else 0.0)
    return found


def to_xywh(box: Box) -> list[float]:
    """Corners to COCO ``[x, y, w, h]``."""
    return [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]


def clip(box: Box, width: int, height: int) -> Box | None:
    """The part of ``box`` inside an image of ``width`` x ``height`` pixels; None if there is none.

    A part so small that its area is 0 in double precision is none.
    """
    x0, y0 = max(box.x0, 0.0), max(box.y0, 0.0)
    x1, y1 = min(box.x1, float(width)), min(box.y1, float(height))
    inside = Box(x0, y0, x1, y1)
    return inside if x1 > x0 and y1 > y0 and area(inside) > 0 else None


def area(box: Box) -> float:
    """Area in px^2."""
    return (box.x1 - box.x0) * (box.y1 - box.y0)


def band_index(areas: NDArray[np.float64] | Sequence[float]) -> NDArray[np.int64]:
    """Band of each box area: 0 small, 1 medium, 2 large. Every area has exactly one band (METHOD section 3)."""
    borders = [SMALL_UP_TO, MEDIUM_UP_TO]
    return np.digitize(np.asarray(areas, dtype=np.float64), borders, right=True).astype(np.int64)


def band(box_area: float) -> str:
    """Name of the band of one box area."""
    return BANDS[int(band_index([box_area])[0])]


def outer_pixels(box: Box, width: int, height: int) -> Window:
    """The smallest window of whole pixels that holds ``box``, within the image: no mask pixel may lie outside it."""
    return Window(
        max(math.floor(box.x0), 0),
        max(math.floor(box.y0), 0),
        min(math.ceil(box.x1), width),
        min(math.ceil(box.y1), height),
    )


def central_window(box: Box, margin_rate: Sequence[float] = (0.6, 0.6)) -> Window:
    """The window of evaluation and inference: every half-extent times ``1 + 0.5 * margin_rate[0]``."""
    return _window(box, (0.5 * margin_rate[0],) * 4)


def train_window(box: Box, margin_rate: Sequence[float], rng: np.random.Generator, gate: bool = True) -> Window:
    """A random window of training: a margin per side, uniform in ``margin_rate``, times a gate per axis.

    The gate ``g`` (left, top) and ``1 - g`` (right, bottom) is uniform in [0, 1], so a box is not always centred.
    Without ``gate`` both are 1: the box is centred but for the difference of the margins.
    """
    low, high = margin_rate
    left, top, right, bottom = rng.uniform(low, high, 4)
    if not gate:
        return _window(box, (left, top, right, bottom))
    gate_x, gate_y = rng.uniform(0.0, 1.0, 2)
    return _window(box, (left * gate_x, top * gate_y, right * (1.0 - gate_x), bottom * (1.0 - gate_y)))


def _window(box: Box, margins: Sequence[float]) -> Window:
    """Grow ``box`` about its centre by ``margins`` (left, top, right, bottom; parts of the half-extent), make it whole.

    One is added on the right and bottom before rounding outwards (paper's code, METHOD section 2).
    """
    centre_x, centre_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    half_w, half_h = (box.x1 - box.x0) / 2, (box.y1 - box.y0) / 2
    left, top, right, bottom = margins
    return Window(
        math.floor(centre_x - half_w * (1 + left)),
        math.floor(centre_y - half_h * (1 + top)),
        math.ceil(centre_x + half_w * (1 + right) + 1),
        math.ceil(centre_y + half_h * (1 + bottom) + 1),
    )
