"""Cut a window out of an image, put it back, and resize it: the plain reference on the CPU, used by training as well.

`mal.predictor` does the same in batches on a device and is tested against this module (METHOD section 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal.boxes import Box, Window

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue, for pixels in [0, 1]: what every backbone's input is normalised by."""


def cut(image: NDArray[Any], window: Window) -> NDArray[Any]:
    """The pixels of ``window``; where it leaves the image they wrap around, at any distance.

    Wrapping adds no artificial border: the mean field reads raw pixels, and a constant margin would be an edge to it.

    Args:
        image: ``[H, W]`` or ``[H, W, C]``, not empty.
        window: at least one pixel wide and high.

    Returns:
        ``[h, w]`` or ``[h, w, C]``. A view of ``image`` when the window lies inside, a new array otherwise.
    """
    height, width = image.shape[:2]
    rows, columns = _runs(window.y0, window.y1, height), _runs(window.x0, window.x1, width)
    # Single runs first: they are views, so that only what the window needs is copied by the concatenations.
    if len(rows) == 1:
        image = image[rows[0]]
    if len(columns) == 1:
        image = image[:, columns[0]]
    if len(rows) > 1:
        image = np.concatenate([image[run] for run in rows], axis=0)
    if len(columns) > 1:
        image = np.concatenate([image[:, run] for run in columns], axis=1)
    return image


def paste(image: NDArray[Any], pixels: NDArray[Any], window: Window) -> None:
    """Write ``pixels`` of ``window`` into ``image``, in place: the inverse of `cut`. What leaves the image is dropped.

    Args:
        image: ``[H, W]`` or ``[H, W, C]``.
        pixels: ``[h, w]`` or ``[h, w, C]``, the size of the window.
        window: may lie outside the image in part or entirely.
    """
    height, width = image.shape[:2]
    inside = within(window, width, height)
    if inside is not None:
        image[inside.y0 : inside.y1, inside.x0 : inside.x1] = pixels[
            inside.y0 - window.y0 : inside.y1 - window.y0, inside.x0 - window.x0 : inside.x1 - window.x0
        ]


def within(window: Window, width: int, height: int) -> Window | None:
    """The part of ``window`` inside an image of ``width`` x ``height`` pixels; None if there is none."""
    x0, y0 = max(window.x0, 0), max(window.y0, 0)
    x1, y1 = min(window.x1, width), min(window.y1, height)
    return Window(x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize ``[h, w]`` or ``[h, w, 3]`` to ``size`` x ``size`` by Pillow's bicubic filter with antialiasing."""
    image = Image.fromarray(pixels)
    if vertical_first(image.height, image.width, size):
        image = image.resize((image.width, size), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def vertical_first(height: int, width: int, size: int) -> bool:
    """Whether a resize to ``size`` x ``size`` filters the columns first.

    Pixels are rounded between the two axes, so the order shows, by up to 20 of 255 at sharp edges. This is the rule of
    Pillow 13; older releases always begin with the rows. Spelled out, it makes the same crops with either.
    """
    return height - size > 2 * max(width - size, 0)


def box_mask(window: Window, box: Box, width: int, height: int, size: int) -> NDArray[np.uint8]:
    """The box mask as the crop shows it: of the window's size, then `resize`, but without building that.

    It is 1 in the image's rows ``int(y0)..int(y1)`` and columns ``int(x0)..int(x1)``, both ends included, and 0 where
    the window leaves the image: unlike the pixels it does not wrap around, the box is in the crop once.

    Args:
        window: the window around the box.
        box: in pixels of the image, clipped to it.
        width, height: of the image.
        size: side of the crop.

    Returns:
        ``[size, size]``, 0 or 1 (bicubic values of a uint8 mask, rounded).
    """
    rows, columns = box_mask_axes(window, box, width, height, size)
    return rows[:, None] * columns[None, :]


def box_mask_axes(
    window: Window, box: Box, width: int, height: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The two factors of `box_mask`, each ``[size]``: 1 for the rows, and the columns, inside the box.

    A box mask is the product of its rows and its columns, and stays so when it is resized: the filter works along one
    axis after the other and rounds each time.
    """
    rows = _axis_mask(window.y0, window.y1, box.y0, box.y1, height, size)
    columns = _axis_mask(window.x0, window.x1, box.x0, box.x1, width, size)
    return rows, columns


def _axis_mask(start: int, stop: int, low: float, high: float, length: int, size: int) -> NDArray[np.uint8]:
    """One axis of the box mask: window ``start..stop``, box ``low..high``, image of ``length`` pixels, ``[size]``."""
    inside = np.zeros((stop - start, 1), dtype=np.uint8)
    inside[max(int(low) - start, 0) : max(min(int(high) + 1, length) - start, 0)] = 1
    column = Image.fromarray(inside)
    return np.asarray(column.resize((1, size), Image.Resampling.BICUBIC))[:, 0]


def _runs(start: int, stop: int, length: int) -> list[slice]:
    """``start..stop`` modulo ``length`` as the fewest slices of ``0..length``, in order."""
    assert stop > start, f"an empty window: {start}..{stop}"
    runs = []
    while start < stop:
        first = start % length
        taken = min(stop - start, length - first)
        runs.append(slice(first, first + taken))
        start += taken
    return runs
