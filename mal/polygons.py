"""Masks as COCO polygons: one polygon per component, along the pixels' edges, that pycocotools rasterises back.

COCO polygons know no holes: a hole is joined to its outline by a slit of no width, straight up from its topmost edge.
pycocotools counts crossings along columns, so a vertical slit changes no pixel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from rlemasklib import RLEMask

from mal import masks

LEAST_IOU = 0.99
"""Agreement of a simplified polygon with its mask; one that agrees less is not simplified."""
TOLERANCES = (1.0, 0.5)
"""Pixels by which an outline may move when it is simplified, the first that agrees is taken."""

Polygon = list[float]
"""``[x, y, x, y, ...]`` in pixels of the image, the edge of pixel 0 at 0."""


def to_polygons(counts: str, height: int, width: int, *, simplify: bool = True) -> list[Polygon]:
    """The polygons of a mask, one per 4-connected component; none for an empty mask.

    Args:
        counts: compressed COCO RLE counts.
        simplify: leave out vertices as long as the IoU with the mask is at least `LEAST_IOU`; without it, and for
            masks of which this does not hold, the polygons give exactly the mask. Components with holes stay exact.
    """
    mask = RLEMask.from_dict({"size": [height, width], "counts": counts})
    if not mask.any():
        return []
    x, y, w, h = (int(value) for value in mask.bbox())
    outlines = _Outlines.of(mask.crop(np.array([x, y, w, h])).to_array().astype(bool))
    exact = [np.array(ring) + np.array([x, y]) for ring in outlines.rings()]
    if simplify:
        rle = masks.rle(counts, height, width)
        for tolerance in TOLERANCES:
            polygons = [_simplified(ring, tolerance) for ring in exact]
            if masks.iou(from_polygons(polygons, height, width), rle) >= LEAST_IOU:
                return polygons
    return [ring.ravel().tolist() for ring in exact]


def from_polygons(polygons: list[Polygon], height: int, width: int) -> masks.Rle:
    """The inverse: the union of polygons, as pycocotools rasterises it."""
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return masks.rle(str(merged["counts"], "ascii"), height, width)


@dataclass
class _Outlines:
    """The corners of a mask's outlines, linked to rings.

    A corner where two pixels of the mask touch diagonally is two corners, one of each pixel: they do not connect.
    """

    x: list[float]
    y: list[float]
    next: list[int]
    hole: list[bool]
    """By ring: whether background is inside."""
    first: list[int]
    """By ring: the topmost of its leftmost-first corners; rings are sorted by it, from the top."""
    below: dict[int, list[tuple[int, int]]]
    """By line y: the edges ``(corner, next corner)`` that have mask below and background above."""
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> _Outlines:
        """The outlines of a mask [h, w]."""
        x, y, across, along = _corners(mask)
        next_corner, first, backward = [-1] * len(x), [], [False] * len(x)
        for start in range(len(x)):  # corners are sorted by line: the first of a ring is at its top left
            if next_corner[start] >= 0:
                continue
            first.append(start)
            corner = start
            while next_corner[corner] < 0:
                turn = across[corner]
                next_corner[corner], next_corner[turn] = turn, along[turn]
                backward[corner] = x[turn] < x[corner]
                corner = along[turn]
        hole = [not mask[y[start], x[start]] for start in first]
        below = defaultdict(list)
        for ring_start in first:
            corner = ring_start
            while True:
                turn = next_corner[corner]
                line, left = y[corner], min(x[corner], x[turn])
                if line < mask.shape[0] and mask[line, left]:
                    below[line].append((corner, turn))
                corner = next_corner[turn]
                if corner == ring_start:
                    break
        return cls(list(map(float, x)), list(map(float, y)), next_corner, hole, first, dict(below), mask)

    def rings(self) -> list[list[tuple[float, float]]]:
        """The corners of every component's outline, in order, its holes joined to it."""
        for start, hole in zip(self.first, self.hole, strict=True):
            if hole:  # from the top: what is above a hole has been joined already
                self._join(start)
        return [self._ring(start) for start, hole in zip(self.first, self.hole, strict=True) if not hole]

    def _ring(self, start: int) -> list[tuple[float, float]]:
        ring: list[tuple[float, float]] = []
        corner = start
        while not ring or corner != start:
            ring.append((self.x[corner], self.y[corner]))
            corner = self.next[corner]
        return ring

    def _join(self, start: int) -> None:
        """Cut a slit from the middle of the hole's first pixel up to the edge above, and join the two rings."""
        column, top = int(self.x[start]), int(self.y[start])
        above = np.flatnonzero(~self.mask[:top, column])
        line = int(above[-1]) + 1 if len(above) else 0
        middle = column + 0.5
        place = next(
            i
            for i, (a, b) in enumerate(self.below[line])
            if min(self.x[a], self.x[b]) < middle < max(self.x[a], self.x[b])
        )
        a, b = self.below[line].pop(place)
        after = self.next[start]  # the first edge of a hole runs along its top
        down, into, back, up = (self._add(middle, height) for height in (line, top, top, line))
        for corner, follower in ((a, down), (down, into), (into, after), (start, back), (back, up), (up, b)):
            self.next[corner] = follower
        self.below[line] += [(a, down), (up, b)]

    def _add(self, x: float, y: float) -> int:
        self.x.append(x)
        self.y.append(y)
        self.next.append(-1)
        return len(self.x) - 1


def _corners(mask: NDArray[np.bool_]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Where the outlines of a mask turn: x and y of each corner, sorted by line, and its neighbours.

    Returns:
        x, y, and by corner the number of its neighbour on the same line and in the same column. The corners of a line
        pair up from the left, those of a column from the top.
    """
    framed = np.pad(mask, 1)
    a, b, c, d = framed[:-1, :-1], framed[:-1, 1:], framed[1:, :-1], framed[1:, 1:]  # a b above, c d below a grid point
    touching = (a == d) & (b == c) & (a != b)
    y, x = np.nonzero((a ^ b ^ c ^ d) | touching)
    twice = touching[y, x]
    # Of two corners at one point: is it that of the right pixel, is it that of the lower one.
    right = np.zeros(len(x), dtype=np.int64)
    y, x = np.concatenate([y, y[twice]]), np.concatenate([x, x[twice]])
    falling = a[y[len(right) :], x[len(right) :]]  # mask at a and d; else at b and c
    first_lower = np.zeros(len(right), dtype=np.int64)
    first_lower[twice] = ~falling
    right = np.concatenate([right, np.ones(len(falling), dtype=np.int64)])
    lower = np.concatenate([first_lower, falling.astype(np.int64)])
    order = np.lexsort((right, x, y))
    x, y, right, lower = x[order], y[order], right[order], lower[order]
    across = _pairs(np.arange(len(x)))
    along = _pairs(np.lexsort((lower, y, x)))
    return x.tolist(), y.tolist(), across.tolist(), along.tolist()


def _pairs(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """By element its partner, when the elements in ``order`` pair up: first and second, third and fourth ..."""
    partner = np.empty(len(order), dtype=np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def _simplified(ring: NDArray[np.float64], tolerance: float) -> Polygon:
    """Douglas and Peucker (1973): the fewest corners, chosen greedily, that stay within ``tolerance`` pixels.

    Rings with slits, which have corners between the pixels, are left as they are.
    """
    if len(ring) <= 4 or (ring % 1).any():
        return ring.ravel().tolist()
    farthest = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    closed = np.concatenate([ring, ring[:1]])
    kept = {0, farthest}
    stack = [(0, farthest), (farthest, len(ring))]
    while stack:
        low, high = stack.pop()
        if high - low < 2:
            continue
        inner, chord = closed[low + 1 : high] - closed[low], closed[high] - closed[low]
        length = float(np.hypot(*chord)) or 1.0
        distance = np.abs(inner[:, 0] * chord[1] - inner[:, 1] * chord[0]) / length
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance:
            kept.add(low + 1 + worst)
            stack += [(low, low + 1 + worst), (low + 1 + worst, high)]
    chosen = ring[sorted(kept)]
    return (chosen if len(chosen) >= 3 else ring).ravel().tolist()
