"""Arithmetic of boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal import boxes
from mal.boxes import Box, Window

whole = st.integers(-500, 500)
sides = st.integers(1, 500)


@given(whole, whole, sides, sides)
def test_corners_and_coco_boxes_are_inverse(x, y, w, h):
    assert boxes.to_xywh(boxes.from_xywh([x, y, w, h])) == [x, y, w, h]


@given(whole, whole, sides, sides)
def test_a_clipped_box_lies_in_its_image_and_is_clipped_once(x, y, w, h):
    inside = boxes.clip(boxes.from_xywh([x, y, w, h]), 100, 80)
    if inside is None:
        assert x >= 100 or y >= 80 or x + w <= 0 or y + h <= 0
        return
    assert 0 <= inside.x0 < inside.x1 <= 100
    assert 0 <= inside.y0 < inside.y1 <= 80
    assert boxes.clip(inside, 100, 80) == inside


def test_a_box_without_an_area_in_double_precision_is_none():
    tiny = Box(0.0, 0.0, 1e-200, 1e-200)
    assert boxes.clip(tiny, 100, 80) is None
    assert boxes.overlaps([tiny, Box(0.0, 0.0, 5.0, 5.0)]) == [0.0, 0.0]


def test_every_area_has_one_band_the_borders_the_lower():
    areas = [0.0, 1024.0, 1024.1, 9216.0, 9216.1, 1e12]
    assert [boxes.band(a) for a in areas] == ["small", "small", "medium", "medium", "large", "large"]


def test_outer_pixels_hold_the_box_and_stay_in_the_image():
    assert boxes.outer_pixels(Box(1.2, 2.0, 3.4, 5.0), 10, 10) == Window(1, 2, 4, 5)
    assert boxes.outer_pixels(Box(-3.0, 2.5, 12.0, 5.5), 10, 5) == Window(0, 2, 10, 5)


@given(st.integers(0, 2**32), sides, sides)
def test_a_training_window_holds_its_box_and_keeps_to_its_margins(seed, w, h):
    box = boxes.from_xywh([50, 60, w, h])
    window = boxes.train_window(box, (0.0, 1.2), np.random.default_rng(seed))
    assert window.x0 <= box.x0 < box.x1 < window.x1
    assert window.width <= w * 2.2 + 3
    assert window.y0 <= box.y0 < box.y1 < window.y1
    assert window.height <= h * 2.2 + 3


def test_without_the_gate_every_side_has_its_whole_margin_and_the_box_stays_near_the_centre():
    box = boxes.from_xywh([100, 100, 200, 100])
    for seed in range(50):
        window = boxes.train_window(box, (0.2, 0.4), np.random.default_rng(seed), gate=False)
        left, top, right, bottom = 100 - window.x0, 100 - window.y0, window.x1 - 300, window.y1 - 200
        assert 20 <= left <= 41
        assert 20 <= right <= 43
        assert 10 <= top <= 21
        assert 10 <= bottom <= 23
    same = boxes.train_window(box, (0.3, 0.3), np.random.default_rng(0), gate=False)
    assert same == boxes.central_window(box, (0.6, 0.6))


def test_the_central_window_is_1_3_times_the_box():
    window = boxes.central_window(boxes.from_xywh([100, 100, 200, 100]))
    assert window == Window(70, 85, 331, 216)
    assert (window.width, window.height) == pytest.approx((261, 131))


def test_overlaps_of_known_boxes():
    table, cup, same, apart = Box(0, 0, 100, 50), Box(10, 10, 20, 20), Box(0, 0, 100, 45), Box(200, 0, 210, 9)
    found = boxes.overlaps([table, cup, same, apart])
    # The cup covers a little of the table, whose second box does not count; the table covers the whole cup.
    assert found == pytest.approx([100 / 5000, 1.0, 100 / 4500, 0.0])
    assert boxes.overlaps([table]) == [0.0]
    assert boxes.overlaps([]) == []


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), st.integers(1, 40)), max_size=8))
def test_overlaps_are_those_of_pixels(placed):
    maps = np.zeros((len(placed), 100, 100), bool)
    for pixels, (x, y, w, h) in zip(maps, placed, strict=True):
        pixels[y : y + h, x : x + w] = True
    expected = []
    for i, own in enumerate(maps):
        shared = [0.0]
        for j, other in enumerate(maps):
            common = np.count_nonzero(own & other)
            if j != i and common <= boxes.SAME_OBJECT * np.count_nonzero(own | other):
                shared.append(common / np.count_nonzero(own))
        expected.append(max(shared))
    assert boxes.overlaps([boxes.from_xywh(box) for box in placed]) == pytest.approx(expected)
