"""Windows out of images and back, and the reference resize."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mal import boxes, crops
from mal.boxes import Box, Window

sides = st.integers(1, 12)


@st.composite
def windows(draw: st.DrawFn, reach: int = 40) -> Window:
    x0, y0 = draw(st.integers(-reach, reach)), draw(st.integers(-reach, reach))
    return Window(x0, y0, x0 + draw(st.integers(1, reach)), y0 + draw(st.integers(1, reach)))


def numbered(height: int, width: int) -> np.ndarray:
    return np.arange(height * width * 3).reshape(height, width, 3)


@given(sides, sides, windows())
def test_cut_takes_every_pixel_modulo_the_image(height: int, width: int, window: Window) -> None:
    image = numbered(height, width)
    rows = np.arange(window.y0, window.y1) % height
    columns = np.arange(window.x0, window.x1) % width
    np.testing.assert_array_equal(crops.cut(image, window), image[np.ix_(rows, columns)])
    np.testing.assert_array_equal(crops.cut(image[..., 0], window), image[..., 0][np.ix_(rows, columns)])


def test_cut_inside_is_a_view() -> None:
    image = numbered(6, 8)
    assert np.shares_memory(crops.cut(image, Window(2, 1, 8, 6)), image)


@given(sides, sides, windows())
def test_paste_of_a_cut_changes_nothing(height: int, width: int, window: Window) -> None:
    image = numbered(height, width)
    again = image.copy()
    crops.paste(again, crops.cut(image, window), window)
    np.testing.assert_array_equal(again, image)


@given(sides, sides, windows())
def test_paste_writes_the_part_inside_and_no_more(height: int, width: int, window: Window) -> None:
    image = np.full((height, width), -1)
    pixels = np.arange(window.height * window.width).reshape(window.height, window.width)
    crops.paste(image, pixels, window)
    for y in range(height):
        for x in range(width):
            inside = window.x0 <= x < window.x1 and window.y0 <= y < window.y1
            assert image[y, x] == (pixels[y - window.y0, x - window.x0] if inside else -1)


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.floats(0, 3),
    st.sampled_from([8, 16, 33]),
)
def test_box_mask_is_the_resized_window_of_the_full_mask(
    width: int, height: int, corners: tuple[float, float, float, float], margin: float, size: int
) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    box = Box(x0 * width, y0 * height, x1 * width, y1 * height)
    window = boxes.central_window(box, (margin, margin))
    full = np.zeros((height, width), dtype=np.uint8)
    full[int(box.y0) : int(box.y1) + 1, int(box.x0) : int(box.x1) + 1] = 1
    cropped = np.zeros((window.height, window.width), dtype=np.uint8)
    crops.paste(cropped, full, Window(-window.x0, -window.y0, width - window.x0, height - window.y0))
    np.testing.assert_array_equal(crops.box_mask(window, box, width, height, size), crops.resize(cropped, size))


def test_box_mask_shows_the_box_once_where_the_pixels_repeat_it() -> None:
    """A window twice the image's height, the box as high as the image."""
    mask = crops.box_mask(Window(0, -8, 16, 24), Box(0, 0, 16, 16), 16, 16, 32)
    np.testing.assert_array_equal(np.flatnonzero(mask[:, 0]), np.arange(8, 24))


@pytest.mark.parametrize(("height", "width"), [(5, 7), (90, 20), (20, 90), (90, 80), (200, 60), (1, 1)])
def test_resize_filters_the_axes_in_the_order_it_says(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = 32
    between = (width, size) if crops.vertical_first(height, width, size) else (size, height)
    bicubic = Image.Resampling.BICUBIC
    stepwise = Image.fromarray(pixels).resize(between, bicubic).resize((size, size), bicubic)
    np.testing.assert_array_equal(crops.resize(pixels, size), np.asarray(stepwise))


@pytest.mark.shared
def test_crops_and_box_masks_agree_with_the_reference(shared_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    items = torch.load(shared_dir / "reference" / "crops.pt", weights_only=True)["items"]
    compared = 0
    for item in items:
        height, width = item["image_hw"]
        box = boxes.clip(boxes.from_xywh(item["bbox_xywh"]), width, height)
        assert box is not None
        window = boxes.central_window(box)
        assert list(window) == item["ext_box"]
        for size in (512, 256):
            assert digest(crops.box_mask(window, box, width, height, size)) == item[f"boxmask_sha256_{size}"]
        for path in shared_dir.glob(f"coco/*/images/{item['file_name']}"):
            image = np.array(Image.open(path).convert("RGB"))
            if digest(image) != item["decoded_sha256"]:
                continue  # another JPEG decoder
            pixels = crops.cut(image, window)
            assert digest(pixels) == item["ext_crop_sha256"]
            for size in (512, 256):
                assert digest(crops.resize(pixels, size)) == item[f"image_sha256_{size}"]
            compared += 1
    assert compared > 0


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
