"""Cleaning of finished masks: largest component, holes, small components. Works on RLEs, never on pixels.

Components of a mask are 8-connected, holes 4-connected; a hole is background that no path leads out of, so what a mask
cuts off at the image's border is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rlemasklib import RLEMask

from mal.errors import InputError

_MASK, _BACKGROUND = 8, 4


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What is done to every mask, in this order. By default nothing."""

    fill_holes: bool = False
    """Make holes part of the mask."""
    largest_component: bool = False
    """Keep the largest component alone."""
    min_component_area: int = 0
    """Drop components of fewer pixels; the mask may end up empty."""

    def __bool__(self) -> bool:
        return self.fill_holes or self.largest_component or self.min_component_area > 1


NO_CLEANING = Cleaning()


def clean(counts: str, height: int, width: int, cleaning: Cleaning) -> str:
    """The cleaned mask.

    Args:
        counts: compressed COCO RLE counts of an image of ``height`` x ``width`` pixels.

    Raises:
        InputError: the encoding is broken.
    """
    if not cleaning:
        return counts
    try:
        mask = RLEMask.from_dict({"size": [height, width], "counts": counts})
    except ValueError as error:
        raise InputError(f"The RLE's counts are broken, or not of a mask of {height} x {width} pixels.") from error
    if cleaning.fill_holes:
        mask = _filled(mask)
    if cleaning.largest_component and mask.any():
        mask = mask.largest_connected_component(connectivity=_MASK)
    if cleaning.min_component_area > 1 and mask.any():
        mask = mask.remove_small_components(min_size=cleaning.min_component_area, connectivity=_MASK)
    return str(mask.to_dict()["counts"], "ascii")


def _filled(mask: RLEMask) -> RLEMask:
    # With a frame of background around the image, what is outside the mask is one component, the one at the corner.
    framed = mask.pad(1, 1, 1, 1)

    def is_hole(_: NDArray[np.int64], bboxes: NDArray[np.int64], __: NDArray[np.float64]) -> NDArray[np.bool_]:
        return bboxes[:, 0] > 0

    holes = framed.complement().connected_components(connectivity=_BACKGROUND, filter_fn=is_hole)
    if not holes:
        return mask
    height, width = mask.shape
    return RLEMask.union([framed, *holes]).crop(np.array([1, 1, width, height]))
