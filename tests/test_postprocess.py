"""Cleaning of masks, against a plain reference on pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mal import masks
from mal.boxes import Window
from mal.errors import InputError
from mal.postprocess import Cleaning, clean

any_mask = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 1))
)


def cleaned(mask: np.ndarray, **options: object) -> np.ndarray:
    counts = masks.encode(mask.astype(bool), Window(0, 0, mask.shape[1], mask.shape[0]), *mask.shape)
    return masks.decode(clean(counts, *mask.shape, Cleaning(**options)), *mask.shape)  # type: ignore[arg-type]


def components(mask: np.ndarray, *, diagonal: bool) -> list[np.ndarray]:
    """Components of the pixels that are 1, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy or dx) and (diagonal or not (dy and dx))]
    found = []
    while left:
        stack, component = [left.pop()], np.zeros_like(mask)
        while stack:
            y, x = stack.pop()
            component[y, x] = 1
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            stack += near
        found.append(component)
    return found


@settings(max_examples=200, deadline=None)
@given(any_mask)
def test_holes_are_background_that_no_path_leads_out_of(mask: np.ndarray) -> None:
    expected = mask.copy()
    for background in components(1 - np.pad(mask, 1), diagonal=False):
        if not background[0, 0]:
            expected |= background[1:-1, 1:-1]
    np.testing.assert_array_equal(cleaned(mask, fill_holes=True), expected)


@settings(max_examples=200, deadline=None)
@given(any_mask)
def test_largest_component(mask: np.ndarray) -> None:
    found = cleaned(mask, largest_component=True)
    parts = components(mask, diagonal=True)
    if not parts:
        assert not found.any()
        return
    assert found.sum() == max(part.sum() for part in parts)
    assert any((found == part).all() for part in parts)


@settings(max_examples=200, deadline=None)
@given(any_mask, st.integers(0, 12))
def test_small_components_go(mask: np.ndarray, least: int) -> None:
    kept = [part for part in components(mask, diagonal=True) if part.sum() >= least]
    np.testing.assert_array_equal(cleaned(mask, min_component_area=least), sum(kept, np.zeros_like(mask)))


@given(any_mask)
def test_nothing_is_done_by_default(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(cleaned(mask), mask)


def test_a_corner_that_is_cut_off_is_no_hole() -> None:
    mask = np.triu(np.ones((6, 6), np.uint8), 1)[::-1]
    np.testing.assert_array_equal(cleaned(mask, fill_holes=True), mask)


def test_a_broken_encoding_is_the_inputs_fault() -> None:
    with pytest.raises(InputError, match="broken"):
        clean("abc", 4, 4, Cleaning(fill_holes=True))
