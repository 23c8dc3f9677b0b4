"""Polygons: pycocotools rasterises them back to the mask they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from mal import masks
from mal.boxes import Window
from mal.polygons import LEAST_IOU, from_polygons, to_polygons


def encoded(mask: np.ndarray) -> str:
    return masks.encode(mask.astype(bool), Window(0, 0, mask.shape[1], mask.shape[0]), *mask.shape)


def back(mask: np.ndarray, *, simplify: bool) -> np.ndarray:
    polygons = to_polygons(encoded(mask), *mask.shape, simplify=simplify)
    assert all(len(points) >= 6 and len(points) % 2 == 0 for points in polygons)
    return masks.decode(from_polygons(polygons, *mask.shape)["counts"], *mask.shape)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
        lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 1))
    )
)
def test_unsimplified_polygons_are_exactly_the_mask(mask: np.ndarray) -> None:
    """Any mask at all: diagonal contacts, holes in holes, single pixels."""
    if mask.any():
        np.testing.assert_array_equal(back(mask, simplify=False), mask)
    else:
        assert to_polygons(encoded(mask), *mask.shape) == []


def blobs(seed: int, side: int) -> np.ndarray:
    """A smooth random mask, with holes and islands, as a network might make it."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(6, 6))
    grid = np.linspace(0, 5, side)
    low = np.minimum(grid.astype(int), 4)
    share = grid - low
    rows = coarse[low] * (1 - share)[:, None] + coarse[low + 1] * share[:, None]
    field = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return (field > rng.uniform(-0.7, 0.3)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(48, 200))
def test_simplified_polygons_agree(seed: int, side: int) -> None:
    mask = blobs(seed, side)
    if mask.sum() > 32 * 32:
        found = back(mask, simplify=True)
        assert (found & mask).sum() / (found | mask).sum() >= LEAST_IOU


def test_simplifying_leaves_out_most_corners() -> None:
    y, x = np.mgrid[:200, :200]
    disc = ((x - 100) ** 2 + (y - 90) ** 2 < 80**2).astype(np.uint8)
    plain, simple = (to_polygons(encoded(disc), 200, 200, simplify=flag) for flag in (False, True))
    assert len(plain) == len(simple) == 1
    assert len(simple[0]) < len(plain[0]) / 4


def test_a_hole_is_no_polygon_of_its_own_and_components_are() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[2:20, 3:20] = 1
    mask[5:8, 6:10] = mask[5:8, 12:15] = mask[10:15, 6:15] = 0
    mask[22:28, 25:35] = 1
    polygons = to_polygons(encoded(mask), 30, 40)
    assert len(polygons) == 2
    joined = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 30, 40)))
    np.testing.assert_array_equal(joined, mask)


def test_position_in_the_image() -> None:
    mask = np.zeros((100, 80), np.uint8)
    mask[95:, 70:] = 1
    (points,) = to_polygons(encoded(mask), 100, 80)
    assert sorted(zip(points[::2], points[1::2], strict=True)) == [(70, 95), (70, 100), (80, 95), (80, 100)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_thin_masks(shape: tuple[int, int]) -> None:
    np.testing.assert_array_equal(back(np.ones(shape, np.uint8), simplify=True), np.ones(shape))
