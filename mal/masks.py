"""Masks as COCO run-length encodings (RLE): made inside a window, read, measured and compared.

An RLE is ``{"size": [height, width], "counts": text}`` with the compressed counts as ASCII text, the form that goes
into a COCO file's ``segmentation``. The tables hold ``counts`` alone beside the image's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from rlemasklib import RLEMask

from mal.boxes import Window
from mal.crops import within
from mal.errors import InputError

FARTHEST_VERTEX = 1e5
"""Polygon vertices beyond this (pixels) are refused: pycocotools walks along every edge in fifths of a pixel."""

BOUNDARY_DILATION = 0.02
"""Width of the boundary of Boundary IoU, as a part of the image's diagonal."""


class Rle(TypedDict):
    """Compressed COCO run-length encoding of one image-sized mask."""

    size: list[int]  # height, width
    counts: str


def rle(counts: str, height: int, width: int) -> Rle:
    """The ``segmentation`` of a COCO annotation from a table's ``counts``."""
    return {"size": [height, width], "counts": counts}


def encode(mask: NDArray[np.bool_] | NDArray[np.uint8], window: Window, height: int, width: int) -> str:
    """Compressed RLE counts of the image-sized mask that holds ``mask`` at ``window``, without building it.

    The same text as pycocotools gives for the image-sized array. Fastest for an array in Fortran order.

    Args:
        mask: ``[h, w]`` of the window's size, 0 or 1.
        window: where the mask lies; what leaves the image is dropped.
        height, width: of the image.
    """
    return encode_bounded(mask, window, height, width)[0]


def encode_bounded(
    mask: NDArray[np.bool_] | NDArray[np.uint8], window: Window, height: int, width: int
) -> tuple[str, Window | None]:
    """`encode`, and the `bounds` of what it encodes, which cost nothing at that moment."""
    inside = within(window, width, height)
    if inside is None:
        return str(RLEMask.zeros((height, width)).to_dict()["counts"], "ascii"), None
    part = mask[
        inside.y0 - window.y0 : inside.y1 - window.y0,
        inside.x0 - window.x0 : inside.x1 - window.x0,
    ]
    encoded = RLEMask.from_array(np.asfortranarray(part).view(np.uint8))
    padded = encoded.pad(inside.y0, height - inside.y1, inside.x0, width - inside.x1)
    return str(padded.to_dict()["counts"], "ascii"), _bounds(padded)


def decode(counts: str, height: int, width: int) -> NDArray[np.uint8]:
    """The inverse of `encode`: the image-sized mask ``[height, width]``, 0 or 1. Raises InputError."""
    return _parse(counts, height, width).to_array()


def area(counts: str, height: int, width: int) -> int:
    """Pixels of the mask. Raises InputError."""
    return int(_parse(counts, height, width).area())


def bounds(counts: str, height: int, width: int) -> Window | None:
    """The smallest window that holds the mask; None for an empty one. Raises InputError."""
    return _bounds(_parse(counts, height, width))


def _bounds(mask: RLEMask) -> Window | None:
    if not mask.any():
        return None
    x, y, w, h = (int(value) for value in mask.bbox())
    return Window(x, y, x + w, y + h)


def iou(a: Rle, b: Rle) -> float:
    """Intersection over union of two masks of the same image, 0..1; 0 for two empty masks, as in pycocotools.

    Raises InputError if the sizes differ or an encoding is broken.
    """
    if list(a["size"]) != list(b["size"]):
        raise InputError(f"Masks of different images cannot be compared: sizes {a['size']} and {b['size']}.")
    return float(_parse(a["counts"], *a["size"]).iou(_parse(b["counts"], *b["size"])))


def boundary_iou(a: Rle, b: Rle, dilation: float = BOUNDARY_DILATION) -> float:
    """IoU of what two masks of an image have near their outlines, 0..1; 0 for two empty masks.

    Cheng et al., "Boundary IoU" (CVPR 2021), as their code has it: of each mask the pixels that an erosion by a square
    takes away, ``dilation`` times the image's diagonal on every side, rounded, at least one pixel. Outside the image
    there is no mask. Computed on runs, without an image-sized array.

    Raises InputError if the sizes differ or an encoding is broken.
    """
    if list(a["size"]) != list(b["size"]):
        raise InputError(f"Masks of different images cannot be compared: sizes {a['size']} and {b['size']}.")
    height, width = a["size"]
    distance = max(1, round(dilation * math.hypot(height, width)))
    rims = [_rim(_parse(mask["counts"], height, width), distance) for mask in (a, b)]
    return float(rims[0].iou(rims[1]))


def _rim(mask: RLEMask, distance: int) -> RLEMask:
    """The mask's pixels with background, or what is outside the image, in the square of ``distance`` around them."""
    height, width = mask.shape
    framed = mask.pad(distance, distance, distance, distance)
    inner = framed.erode(kernel_shape="square", kernel_size=2 * distance + 1)
    return mask - inner.crop(np.array([distance, distance, width, height]))


def from_segmentation(segmentation: Any, height: int, width: int) -> Rle:
    """The ``segmentation`` of a COCO annotation as RLE, as pycocotools rasterises it.

    Args:
        segmentation: decoded JSON: a list of polygons ``[x, y, x, y, ...]`` (their union is meant), or an RLE with
            compressed (text) or uncompressed (list) counts.
        height, width: of the image.

    Raises:
        InputError: it is none of these, does not fit the image, or holds no polygon with three points.
    """
    if isinstance(segmentation, Mapping):
        return _from_rle(segmentation, height, width)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        polygons = [_polygon(points) for points in segmentation]
        # Two points enclose nothing, and pycocotools would take their four numbers for a box.
        polygons = [points for points in polygons if len(points) >= 6]
        if not polygons:
            raise InputError("The segmentation holds no polygon with at least three points.")
        merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return rle(str(merged["counts"], "ascii"), height, width)
    raise InputError(f"A segmentation is a list of polygons or an RLE object, not {type(segmentation).__name__}.")


def _from_rle(segmentation: Mapping[str, Any], height: int, width: int) -> Rle:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise InputError(f"The RLE's size {size!r} is not the image's [{height}, {width}] (height, width).")
    if isinstance(counts, str):
        _parse(counts, height, width)
        return rle(counts, height, width)
    if isinstance(counts, list) and all(type(run) is int and 0 <= run <= height * width for run in counts):
        try:
            encoded = RLEMask.from_counts(counts, (height, width))
        except ValueError as error:
            raise InputError(f"The RLE's counts do not add up to its size [{height}, {width}].") from error
        return rle(str(encoded.to_dict()["counts"], "ascii"), height, width)
    raise InputError("The counts of an RLE are a text (compressed) or a list of whole numbers (run lengths).")


def _polygon(points: Any) -> list[float]:
    if not isinstance(points, Sequence) or isinstance(points, str | bytes):
        raise InputError(f"A polygon is a list of numbers, not {type(points).__name__}.")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in points):
        raise InputError("A polygon holds something that is not a finite number.")
    if len(points) % 2:
        raise InputError(f"A polygon holds {len(points)} numbers; x and y of every point make an even number.")
    if any(abs(value) > FARTHEST_VERTEX for value in points):
        raise InputError(f"A polygon's vertex lies more than {FARTHEST_VERTEX:.0f} pixels away.")
    return [float(value) for value in points]


def _parse(counts: str, height: int, width: int) -> RLEMask:
    try:
        return RLEMask.from_dict({"size": [height, width], "counts": counts})
    except ValueError as error:
        raise InputError(f"The RLE's counts are broken, or not of a mask of {height} x {width} pixels.") from error
