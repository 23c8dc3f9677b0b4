"""Outlines of the objects in rendered scenes: eight classes, no one of them like its box or an ellipse.

An outline is a polygon ``[n, 2]`` of (x, y) points, y downwards, in a unit of its own: `place` turns, sizes and puts
it. Every instance of a class differs a little (points of a star, thickness of a moon, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]

_SUPERSAMPLING = 4
"""Outlines are drawn this many times larger each way, so that an edge pixel knows which part of it is covered."""


def _star(rng: np.random.Generator) -> Points:
    spikes = int(rng.integers(5, 8))
    angles = np.arange(2 * spikes) * np.pi / spikes
    return _polar(np.where(np.arange(2 * spikes) % 2 == 0, 1.0, rng.uniform(0.35, 0.48)), angles)


def _moon(rng: np.random.Generator) -> Points:
    """A disc less a second one to its right; ``tip`` is the angle at which the two circles meet."""
    centre, tip = rng.uniform(0.22, 0.42), rng.uniform(0.85, 1.1)
    bite = np.array([np.cos(tip) - centre, np.sin(tip)])
    half = np.arctan2(bite[1], bite[0])
    inner = _polar(float(np.hypot(*bite)), np.linspace(2 * np.pi - half, half, 32)) + np.array([centre, 0.0])
    return np.vstack([_polar(1.0, np.linspace(tip, 2 * np.pi - tip, 48)), inner])


def _cross(rng: np.random.Generator) -> Points:
    t, arm = rng.uniform(0.18, 0.3), rng.uniform(0.75, 1.0)
    quarter = np.array([[t, -arm], [t, -t], [1.0, -t], [1.0, t], [t, t], [t, arm]])
    return np.vstack([quarter, -quarter])


def _arrow(rng: np.random.Generator) -> Points:
    shaft, neck, barb = rng.uniform(0.13, 0.22), rng.uniform(0.05, 0.35), rng.uniform(0.5, 0.7)
    half = np.array([[1.0, 0.0], [neck, -barb], [neck, -shaft], [-1.0, -shaft]])
    return _mirrored(half)


def _horseshoe(rng: np.random.Generator) -> Points:
    thickness, gap = rng.uniform(0.32, 0.45), rng.uniform(0.6, 1.0)
    angles = np.linspace(gap, 2 * np.pi - gap, 56)
    return np.vstack([_polar(1.0, angles), _polar(1.0 - thickness, angles[::-1])])


def _fish(rng: np.random.Generator) -> Points:
    """A lens for the body, nose to the right, and a forked tail; a fin on the back."""
    belly, tail = rng.uniform(0.3, 0.42), rng.uniform(0.35, 0.5)
    x = np.linspace(1.0, -0.55, 28)
    y = belly * np.sin(np.pi * ((1.04 - x) / 1.75)) ** 0.9
    fork = np.array([[-1.0, tail], [-0.84, 0.0], [-1.0, -tail]])
    back = np.column_stack([x, -y])[::-1]
    fin = np.array([[-0.12, -belly - rng.uniform(0.1, 0.25)]])
    at = int(np.searchsorted(back[:, 0], 0.0))
    return np.vstack([np.column_stack([x, y]), fork, back[:at], fin, back[at + 3 :]])


def _bottle(rng: np.random.Generator) -> Points:
    body, neck, shoulder = rng.uniform(0.26, 0.36), rng.uniform(0.08, 0.12), rng.uniform(-0.1, 0.2)
    slope = np.linspace(0.0, 1.0, 10)
    curve = np.column_stack([shoulder + 0.35 * slope, body + (neck - body) * (3 - 2 * slope) * slope**2])
    base = np.array([[-1.0, 0.0], [-1.0, body - 0.06], [-0.94, body]])
    top = np.array([[0.86, neck], [0.86, neck + 0.05], [1.0, neck + 0.05], [1.0, 0.0]])
    return _mirrored(np.vstack([base, curve, top]))


def _bolt(rng: np.random.Generator) -> Points:
    lean = rng.uniform(-0.1, 0.1)
    half = np.array([[0.3, -1.0], [-0.5 + lean, 0.16], [-0.06, 0.12]])
    return np.vstack([half, [[-0.3, 1.0], [0.5 - lean, -0.16], [0.06, -0.12]]])


SHAPES: dict[str, Callable[[np.random.Generator], Points]] = {
    "star": _star,
    "moon": _moon,
    "cross": _cross,
    "arrow": _arrow,
    "horseshoe": _horseshoe,
    "fish": _fish,
    "bottle": _bottle,
    "bolt": _bolt,
}
"""Class name -> outline of a random instance."""


def _polar(radius: float | Points, angles: Points) -> Points:
    return np.column_stack([radius * np.cos(angles), radius * np.sin(angles)])


def _mirrored(half: Points) -> Points:
    """Close an outline that is symmetric about the x axis."""
    return np.vstack([half, (half * (1.0, -1.0))[::-1]])


def place(outline: Points, *, side: float, angle: float, flip: bool, centre: tuple[float, float]) -> Points:
    """Turn by ``angle`` (radians, after mirroring if ``flip``), scale so that the longer side of the outline's box is
    ``side`` pixels, and put the middle of that box at ``centre`` (x, y in pixels)."""
    points = outline * (1.0, -1.0) if flip else outline
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (side / (high - low).max()) + centre


def coverage(points: Points, corner: tuple[int, int], width: int, height: int) -> NDArray[np.float32]:
    """Part of each pixel inside the polygon, ``[height, width]`` in 0..1; the patch's top left pixel is ``corner``."""
    n = _SUPERSAMPLING
    canvas = Image.new("L", (width * n, height * n))
    # Pillow's coordinates name pixel centres: the continuous point p lies at p * n - 0.5.
    drawn = (points - corner) * n - 0.5
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in drawn], fill=255)
    return np.asarray(canvas.reduce(n), dtype=np.float32) / np.float32(255)
