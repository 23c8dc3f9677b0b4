"""The compiled resize is Pillow's to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal import crops, resizing
from mal.crops import IMAGENET_MEAN, IMAGENET_STD

# Up to above ROWS, so that windows are cut into strips.
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 3 * resizing.ROWS))


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Black and white beside all else: sharp edges overshoot and are cut to bytes."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where(rng.random((height, width, 1)) < 0.5, noise, 255 * (noise > 127)).astype(np.uint8)


def test_it_is_compiled_here() -> None:
    assert resizing._compiled() is not None


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, st.integers(1, 130), st.integers(0, 5))
def test_every_pixel_is_pillows(height: int, width: int, size: int, seed: int) -> None:
    pixels = _noise(height, width, seed)
    np.testing.assert_array_equal(resizing.resize(pixels, size), crops.resize(pixels, size))


@pytest.mark.parametrize(("height", "width"), [(700, 40), (40, 700), (513, 1031), (2048, 3)])
def test_large_and_narrow_windows_are_pillows(height: int, width: int) -> None:
    pixels = _noise(height, width)
    np.testing.assert_array_equal(resizing.resize(pixels, 512), crops.resize(pixels, 512))


@pytest.mark.parametrize("compiled", [True, False])
def test_views_and_read_only_pixels_are_taken(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(resizing, "_compiled", lambda: None)
    image = _noise(90, 80)
    image.flags.writeable = False
    window = image[5:77, 11:70]
    plain = crops.resize(window.copy(), 64)
    np.testing.assert_array_equal(resizing.resize(window, 64), plain)
    out = np.empty((3, 64, 64), np.float32)
    resizing.resize_normalised(window, 64, out)
    expected = (plain / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(out.transpose(1, 2, 0), expected, atol=1e-6)
