"""Pictures for people: images with their masks, boxes and labels drawn in, and sheets of many of them."""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mal import masks as coding
from mal import storage

Mask = NDArray[np.bool_] | coding.Rle
"""A bool array ``[height, width]`` or a COCO RLE, of the size of its image."""

_FILL = 0.42
"""How much of a mask's colour covers the image."""
_GAP = 6
_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_FONT_SIZE = 11


@dataclass(frozen=True)
class Tile:
    """One image of a sheet. ``masks``, ``boxes`` and ``labels`` belong together by place; each may be empty."""

    image: NDArray[np.uint8]
    """RGB ``[height, width, 3]``."""
    masks: Sequence[Mask | None] = ()
    """None where an object has no mask."""
    boxes: Sequence[Sequence[float]] = ()
    """COCO ``[x, y, w, h]`` in pixels of the image."""
    labels: Sequence[str] = ()
    """A few words each, such as `label` gives."""
    title: str = ""
    colours: Sequence[tuple[int, int, int]] = ()
    """RGB 0..255 per object; `colour` of its place by default."""


def colour(k: int) -> tuple[int, int, int]:
    """The colour (RGB 0..255) of object ``k`` of an image: neighbours in number are far apart in hue."""
    hue = (0.02 + k * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.75)[k // 5 % 2], (1.0, 0.85)[k // 3 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def label(category: str, iou: float | None = None) -> str:
    """``category``, followed by the IoU in percent if it is known."""
    return category if iou is None or math.isnan(iou) else f"{category} {100 * iou:.0f}"


def overlay(
    image: NDArray[np.uint8],
    masks: Sequence[Mask | None] = (),
    boxes: Sequence[Sequence[float]] = (),
    labels: Sequence[str] = (),
    *,
    colours: Sequence[tuple[int, int, int]] = (),
) -> NDArray[np.uint8]:
    """The image with each mask as a translucent colour with a thin outline, its box as a thin frame, and its label.

    Args:
        image: RGB ``[height, width, 3]``, left as it is.
        masks: of the image's size; None where there is none.
        boxes: COCO ``[x, y, w, h]``.
        labels: written at the top left of the box, or of the mask where there is no box.
        colours: RGB per object; `colour` of its place by default.

    Returns:
        A new array of the same shape.

    Raises:
        ValueError: a mask is not of the image's size.
        InputError: an RLE is broken.
    """
    height, width = image.shape[:2]
    count = max(len(masks), len(boxes), len(labels))
    chosen = [colours[k] if k < len(colours) else colour(k) for k in range(count)]
    canvas = image.astype(np.float32)
    corners: list[tuple[float, float] | None] = [(float(b[0]), float(b[1])) for b in boxes]
    corners += [None] * (count - len(corners))
    for k, mask in enumerate(masks):
        if mask is None:
            continue
        inside = _as_array(mask)
        if inside.shape != (height, width):
            raise ValueError(f"mask {k} is {inside.shape}, its image {(height, width)}")
        tint = np.array(chosen[k], dtype=np.float32)
        canvas[inside] += _FILL * (tint - canvas[inside])
        canvas[_rim(inside)] = tint
        if corners[k] is None and inside.any():
            rows, columns = np.nonzero(inside)
            corners[k] = float(columns.min()), float(rows.min())
    drawn = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for (x, y, w, h), ink in zip(boxes, chosen, strict=False):
        pen.rectangle((x, y, max(x + w - 1, x), max(y + h - 1, y)), outline=ink)
    for text, corner, ink in zip(labels, corners, chosen, strict=False):
        if text and corner is not None:
            _write_label(pen, text, corner, ink, (width, height))
    return np.array(drawn)


def _as_array(mask: Mask) -> NDArray[np.bool_]:
    if isinstance(mask, np.ndarray):
        return mask.astype(bool)
    height, width = mask["size"]
    return coding.decode(mask["counts"], height, width).astype(bool)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, loaded once: no file of the machine is needed."""
    return ImageFont.load_default(_FONT_SIZE)


def _rim(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask that touch, by a side, one outside it; the image's border counts as outside."""
    framed = np.pad(inside, 1)
    core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return inside & ~core


def _write_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[float, float],
    ground: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """Text on a plate of the object's colour: right above ``corner`` if there is room, else below it."""
    plate_w, plate_h = math.ceil(pen.textlength(text, font=_font())) + 4, _FONT_SIZE + 3
    # Whole pixels: Pillow misplaces text at negative fractions of a pixel.
    x = min(max(round(corner[0]), 0), max(size[0] - plate_w, 0))
    y = round(corner[1]) - plate_h
    y = min(y if y >= 0 else max(round(corner[1]), 0), max(size[1] - plate_h, 0))
    pen.rectangle((x, y, x + plate_w, y + plate_h), fill=ground)
    bright = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 140
    pen.text((x + 2, y + 1), text, fill=_INK if bright else _PAPER, font=_font())


def picture_sheet(tiles: Sequence[Tile], path: str, *, columns: int = 4, tile_width: int = 320) -> None:
    """Write a PNG with the tiles in rows of ``columns``, each ``tile_width`` pixels wide, under their titles.

    Written atomically to any path of `mal.storage`. Raises StorageError if it cannot be written.
    """
    if not tiles or columns < 1:
        raise ValueError(f"a sheet needs tiles and columns, not {len(tiles)} and {columns}")
    drawn = [_drawn_tile(tile, tile_width) for tile in tiles]
    rows = [drawn[k : k + columns] for k in range(0, len(drawn), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    across = min(columns, len(drawn))
    sheet = Image.new("RGB", (across * (tile_width + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for k, tile in enumerate(row):
            sheet.paste(tile, (_GAP + k * (tile_width + _GAP), y))
        y += height + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    storage.write_bytes(path, buffer.getvalue())


def _drawn_tile(tile: Tile, width: int) -> Image.Image:
    """A tile at its final size: resized first, so that lines and letters keep theirs."""
    scale = width / tile.image.shape[1]
    height = max(1, round(tile.image.shape[0] * scale))
    image = Image.fromarray(tile.image).resize((width, height), Image.Resampling.BICUBIC)
    masks = [None if mask is None else _resized_mask(_as_array(mask), width, height) for mask in tile.masks]
    boxes = [[scale * v for v in box] for box in tile.boxes]
    drawn = Image.fromarray(overlay(np.asarray(image), masks, boxes, tile.labels, colours=tile.colours))
    if not tile.title:
        return drawn
    titled = Image.new("RGB", (width, height + _FONT_SIZE + 6), _PAPER)
    titled.paste(drawn, (0, _FONT_SIZE + 6))
    ImageDraw.Draw(titled).text((1, 1), tile.title, fill=_INK, font=_font())
    return titled


def _resized_mask(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey) >= 128
