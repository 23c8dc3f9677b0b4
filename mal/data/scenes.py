"""Rendered scenes with exact masks: a small data set in COCO's format to try everything on, made from a seed.

Textured objects of eight classes (`mal.data.shapes`) lie on textured grounds, cover one another and are cut by the
border. An annotation's mask is the visible part of its object, its box the tight box of that mask.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mal import masks, storage
from mal.boxes import Window
from mal.data import shapes
from mal.errors import InputError

CATEGORIES = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(shapes.SHAPES, start=1)]
"""COCO's list of categories; ids from 1, as there."""

_OBJECTS = (3, 7)
_SIDES = (48.0, 140.0)
"""Shortest and longest size of an object in pixels, before anything hides a part of it."""
_SIDE_TO_IMAGE = 0.6
_VISIBLE = 0.55
"""No object is put where less than this part of it, or of an object below it, would be seen."""
_PLACES_TRIED = 12
_COLOUR_DISTANCE = 0.17
"""Least distance in Oklab (black to white is 1) between an object and what lies around it."""
_JPEG_QUALITY = 95

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class ScenePaths:
    """Where `write_scenes` put the data set."""

    annotations: str
    images: str


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its class and what is seen of it, bool ``[height, width]``."""

    category_id: int
    mask: NDArray[np.bool_]


def write_scenes(folder: str, *, images: int, seed: int, size: tuple[int, int] = (320, 240)) -> ScenePaths:
    """Write ``images`` scenes of ``size`` (width, height) to ``folder/images`` and ``folder/annotations.json``.

    Scene k depends on (seed, k) and the size only: the same call gives the same bytes, and a larger data set begins
    with the smaller one. Masks are compressed COCO RLEs, exact to the pixel.

    Raises:
        InputError: no image is asked for, the seed is negative, or the size is below 64 pixels.
        StorageError: the folder cannot be written.
    """
    width, height = size
    if images < 1 or seed < 0 or min(size) < 64:
        raise InputError(
            f"cannot render {images} scenes of {width} x {height} pixels from seed {seed}; "
            "ask for at least 1 image, a size from 64 x 64 on and a seed from 0 on"
        )
    paths = ScenePaths(storage.join(folder, "annotations.json"), storage.join(folder, "images"))
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for k in range(images):
        pixels, objects = render_scene(np.random.default_rng([seed, k]), width, height)
        name = f"{k + 1:06d}.jpg"
        storage.write_bytes(storage.join(paths.images, name), _jpeg(pixels))
        records.append({"id": k + 1, "file_name": name, "width": width, "height": height, "license": 1})
        annotations += [_annotation(len(annotations) + j, k + 1, o) for j, o in enumerate(objects, start=1)]
    document = {
        "info": {"description": "Rendered scenes of Mask Auto-Labeler on Ray", "version": "1", "seed": seed},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "categories": CATEGORIES,
        "images": records,
        "annotations": annotations,
    }
    storage.write_bytes(paths.annotations, json.dumps(document, separators=(",", ":")).encode())
    return paths


def _annotation(annotation_id: int, image_id: int, item: SceneObject) -> dict[str, Any]:
    """The COCO annotation of one object."""
    height, width = item.mask.shape
    rows, columns = (np.flatnonzero(item.mask.any(axis=axis)) for axis in (1, 0))
    window = Window(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    inside = item.mask[window.y0 : window.y1, window.x0 : window.x1]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": item.category_id,
        "bbox": [window.x0, window.y0, window.width, window.height],
        "area": int(inside.sum()),
        "iscrowd": 0,
        "segmentation": masks.rle(masks.encode(inside, window, height, width), height, width),
    }


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def render_scene(rng: np.random.Generator, width: int, height: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """One scene: its pixels (RGB uint8 ``[height, width, 3]``) and its objects from the bottom to the top."""
    ground = _ground_colours(rng)
    canvas = _textured(rng, width, height, *(_srgb(c) for c in ground))
    owner = np.full((height, width), -1, dtype=np.int16)
    whole: list[int] = []  # pixels of each object were nothing in its way
    kinds: list[int] = []
    colours = list(ground)
    longest = min(_SIDES[1], _SIDE_TO_IMAGE * min(width, height))
    shortest = min(_SIDES[0], longest / 2)
    for _ in range(int(rng.integers(*_OBJECTS, endpoint=True))):
        kind = int(rng.integers(len(CATEGORIES)))
        outline = list(shapes.SHAPES.values())[kind](rng)
        for _ in range(_PLACES_TRIED):
            part = _placed(rng, outline, float(rng.uniform(shortest, longest)), width, height)
            if part is not None and _leaves_all_visible(part, owner, whole):
                break
        else:
            continue
        colour = _distinct_colour(rng, colours)
        _paint(rng, canvas, part, colour)
        owner[part.rows, part.columns][part.inside] = len(whole)
        whole.append(part.pixels)
        kinds.append(kind + 1)
        colours.append(colour)
    pixels = _photographed(rng, canvas)
    return pixels, [SceneObject(kind, owner == k) for k, kind in enumerate(kinds)]


@dataclass(frozen=True)
class _Part:
    """What the image's border leaves of a placed outline."""

    rows: slice
    columns: slice
    cover: Pixels  # 0..1
    pixels: int  # of the whole outline, outside the image too

    @property
    def inside(self) -> NDArray[np.bool_]:
        return self.cover >= 0.5


def _placed(rng: np.random.Generator, outline: shapes.Points, side: float, width: int, height: int) -> _Part | None:
    """Put an outline somewhere; None if the border would cut too much off."""
    points = shapes.place(
        outline,
        side=side,
        angle=float(rng.uniform(0.0, 2 * np.pi)),
        flip=bool(rng.integers(2)),
        centre=(float(rng.uniform(0.0, width)), float(rng.uniform(0.0, height))),
    )
    x0, y0 = (int(v) for v in np.floor(points.min(axis=0)) - 1)
    x1, y1 = (int(v) for v in np.ceil(points.max(axis=0)) + 1)
    cover = shapes.coverage(points, (x0, y0), x1 - x0, y1 - y0)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    kept = cover[top - y0 : bottom - y0, left - x0 : right - x0]
    pixels = int(np.count_nonzero(cover >= 0.5))
    if np.count_nonzero(kept >= 0.5) < _VISIBLE * pixels:
        return None
    return _Part(slice(top, bottom), slice(left, right), kept, pixels)


def _leaves_all_visible(part: _Part, owner: NDArray[np.int16], whole: list[int]) -> bool:
    """Whether enough of every earlier object is seen when ``part`` lies on top."""
    hidden = np.bincount(owner[part.rows, part.columns][part.inside] + 1, minlength=len(whole) + 1)[1:]
    seen = np.bincount(owner.ravel() + 1, minlength=len(whole) + 1)[1:] - hidden
    return bool(np.all(seen >= _VISIBLE * np.asarray(whole)))


def _paint(rng: np.random.Generator, canvas: Pixels, part: _Part, colour: Pixels) -> None:
    """Blend a textured object into the canvas."""
    other = colour + np.array(
        [rng.choice([-1, 1]) * rng.uniform(0.04, 0.12), *rng.uniform(-0.03, 0.03, 2)], dtype=np.float32
    )
    height, width = part.cover.shape
    texture = _textured(rng, width, height, _srgb(colour), _srgb(other))
    below = canvas[part.rows, part.columns]
    below += part.cover[..., None] * (texture - below)


def _photographed(rng: np.random.Generator, canvas: Pixels) -> NDArray[np.uint8]:
    """Light that falls off to one side, a slightly soft lens, and the noise of a sensor."""
    height, width = canvas.shape[:2]
    light = 1.04 - rng.uniform(0.0, 0.16) * _slope(rng, width, height)
    lit = Image.fromarray(np.clip(canvas * light[..., None], 0, 255).astype(np.uint8))
    soft = np.asarray(lit.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7)))), dtype=np.float32)
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.5, 2.5))
    return np.clip(soft + noise + 0.5, 0, 255).astype(np.uint8)


# Textures: a field in 0..1 mixes two colours.


def _textured(rng: np.random.Generator, width: int, height: int, first: Pixels, second: Pixels) -> Pixels:
    """Two colours (RGB 0..255) mixed by a random field: ``[height, width, 3]``."""
    kind = int(rng.integers(4))
    if kind == 0:
        field = _slope(rng, width, height)
    elif kind == 1:
        field = _clouds(rng, width, height, cell=float(rng.uniform(10.0, 40.0)))
    else:
        field = _stripes(rng, width, height, crossed=kind == 3)
    field = 0.8 * field + 0.2 * _clouds(rng, width, height, cell=6.0)
    return first + field[..., None] * (second - first)


def _slope(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Rises from 0 to 1 in a random direction."""
    along = _along(float(rng.uniform(0, 2 * np.pi)), width, height)
    return (along - along.min()) / max(float(np.ptp(along)), 1.0)


def _stripes(rng: np.random.Generator, width: int, height: int, *, crossed: bool) -> Pixels:
    """Soft waves of a random direction and period; two at a right angle if ``crossed`` (dots)."""
    angle, period = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(9.0, 24.0))
    waves = np.sin(_along(angle, width, height) * (2 * np.pi / period))
    if crossed:
        waves = waves * np.sin(_along(angle + np.pi / 2, width, height) * (2 * np.pi / period))
    return np.float32(0.5) + np.float32(0.5) * waves


def _along(angle: float, width: int, height: int) -> Pixels:
    """Distance of each pixel along a direction."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    return x[None, :] * np.float32(np.cos(angle)) + y[:, None] * np.float32(np.sin(angle))


def _clouds(rng: np.random.Generator, width: int, height: int, *, cell: float) -> Pixels:
    """Smooth noise with lumps of about ``cell`` pixels."""
    rows, columns = (max(2, round(n / cell) + 1) for n in (height, width))
    lumps = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.clip(np.asarray(lumps.resize((width, height), Image.Resampling.BICUBIC)), 0.0, 1.0)


# Colours are chosen in Oklab (lightness 0..1, and two axes of hue): there distances are those that are seen.


def _ground_colours(rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Two neighbouring muted colours."""
    hue, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.06)
    first = _oklab(rng.uniform(0.35, 0.85), strength, hue)
    second = _oklab(first[0] + rng.choice([-1, 1]) * rng.uniform(0.03, 0.12), strength, hue + rng.uniform(-0.8, 0.8))
    return first, second


def _distinct_colour(rng: np.random.Generator, taken: list[Pixels]) -> Pixels:
    """A vivid colour that differs from all in ``taken``: the first of some that does so enough, or else the best."""
    best, distance = taken[0], -1.0
    for _ in range(24):
        colour = _oklab(rng.uniform(0.45, 0.85), rng.uniform(0.09, 0.17), rng.uniform(0, 2 * np.pi))
        nearest = min(float(np.linalg.norm(colour - other)) for other in taken)
        if nearest > distance:
            best, distance = colour, nearest
        if distance >= _COLOUR_DISTANCE:
            break
    return best


def _oklab(lightness: float, strength: float, hue: float) -> Pixels:
    return np.array([lightness, strength * np.cos(hue), strength * np.sin(hue)], dtype=np.float32)


def _srgb(lab: Pixels) -> Pixels:
    """Oklab to sRGB 0..255, cut to what a screen shows (Ottosson, "A perceptual color space", 2020)."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ (to_lms @ lab) ** 3, 0.0, 1.0)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * curved).astype(np.float32)
