"""RLEs: the same text as pycocotools, made without an image-sized array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from mal import crops, masks
from mal.boxes import Window
from mal.errors import InputError

sides = st.integers(1, 30)


@st.composite
def placed_masks(draw: st.DrawFn) -> tuple[np.ndarray, Window, int, int]:
    """Mask of a window, the window (may leave the image), height and width of the image."""
    shape = draw(st.tuples(sides, sides))
    fill = draw(st.sampled_from([st.just(False), st.just(True), st.booleans()]))
    mask = draw(arrays(bool, shape, elements=fill))
    x0, y0 = draw(st.integers(-40, 40)), draw(st.integers(-40, 40))
    if draw(st.booleans()):
        mask = np.asfortranarray(mask)
    return mask, Window(x0, y0, x0 + shape[1], y0 + shape[0]), draw(sides), draw(sides)


def full_size(mask: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    image = np.zeros((height, width), dtype=np.uint8)
    crops.paste(image, mask, window)
    return image


def by_pycocotools(image: np.ndarray) -> str:
    return coco_mask.encode(np.asfortranarray(image))["counts"].decode("ascii")


@given(placed_masks())
def test_encode_gives_the_text_of_pycocotools(placed: tuple[np.ndarray, Window, int, int]) -> None:
    assert masks.encode(*placed) == by_pycocotools(full_size(*placed))


@given(placed_masks())
def test_decode_is_the_inverse_of_encode(placed: tuple[np.ndarray, Window, int, int]) -> None:
    _, _, height, width = placed
    image = full_size(*placed)
    counts = masks.encode(*placed)
    np.testing.assert_array_equal(masks.decode(counts, height, width), image)
    assert masks.area(counts, height, width) == image.sum()


@given(sides, sides, st.data())
def test_iou_agrees_with_counting_pixels(height: int, width: int, data: st.DataObject) -> None:
    a, b = (data.draw(arrays(np.uint8, (height, width), elements=st.integers(0, 1))) for _ in range(2))
    union = np.count_nonzero(a | b)
    expected = np.count_nonzero(a & b) / union if union else 0.0
    got = masks.iou(*(masks.rle(by_pycocotools(image), height, width) for image in (a, b)))
    assert got == pytest.approx(expected, abs=1e-12)


def test_iou_refuses_masks_of_different_images() -> None:
    with pytest.raises(InputError, match="different images"):
        masks.iou(masks.rle("9", 3, 3), masks.rle("4", 2, 2))


@given(placed_masks())
def test_segmentations_of_every_kind_of_rle_are_read(placed: tuple[np.ndarray, Window, int, int]) -> None:
    image = full_size(*placed)
    height, width = image.shape
    flat = image.flatten(order="F").tolist()
    runs, value = [0], 0
    for pixel in flat:
        if pixel == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = pixel
    expected = {"size": [height, width], "counts": by_pycocotools(image)}
    assert masks.from_segmentation({"size": [height, width], "counts": runs}, height, width) == expected
    assert masks.from_segmentation(expected, height, width) == expected


coordinates = st.one_of(st.integers(-10, 40), st.floats(-10, 40))


@given(st.lists(st.lists(coordinates, min_size=6, max_size=12).map(lambda p: p[: len(p) // 2 * 2]), min_size=1))
def test_polygons_are_rasterised_as_in_pycocotools(polygons: list[list[float]]) -> None:
    expected = coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in p] for p in polygons], 25, 30))
    assert masks.from_segmentation(polygons, 25, 30)["counts"] == expected["counts"].decode("ascii")


def test_polygons_of_two_points_are_left_out() -> None:
    triangle = [1, 1, 9, 1, 9, 9]
    assert masks.from_segmentation([[0, 0, 5, 5], triangle], 10, 10) == masks.from_segmentation([triangle], 10, 10)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        3,
        "9",
        [],
        [[]],
        [[0, 0, 5, 5]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[0, 0, 5, 5, 0, float("nan")]],
        [[0, 0, 5, 5, 0, 1e12]],
        [[0, 0, 5, 5, 0, "7"]],
        [[0, 0, 5, 5, 0, True]],
        ["012345"],
        [7],
        {},
        {"size": [3, 3]},
        {"size": [3, 4], "counts": [12]},
        {"size": [3, 3], "counts": [4, 4]},
        {"size": [3, 3], "counts": [-1, 10]},
        {"size": [3, 3], "counts": [4.5, 4.5]},
        {"size": [3, 3], "counts": "99"},
        {"size": [3, 3], "counts": ""},
        {"size": [3, 3], "counts": "ÿÿÿ"},
        {"size": [3, 3], "counts": "zzzzzzzzzzzzzzzzzzzzz"},
    ],
)
def test_broken_segmentations_are_refused_with_a_sentence(segmentation: object) -> None:
    with pytest.raises(InputError, match=r"\."):
        masks.from_segmentation(segmentation, 3, 3)


def plain_boundary(mask: np.ndarray, dilation: float) -> np.ndarray:
    """Boundary IoU's boundary as its authors compute it: on the image with a frame of zeros, eroded again and again."""
    height, width = mask.shape
    eroded = np.pad(mask.astype(bool), 1)
    for _ in range(max(1, round(dilation * np.sqrt(height**2 + width**2)))):
        framed = np.pad(eroded, 1, constant_values=True)  # beyond the frame, an erosion sees nothing
        shifts = [framed[y : y + height + 2, x : x + width + 2] for y in range(3) for x in range(3)]
        eroded = np.logical_and.reduce(shifts)
    return mask.astype(bool) & ~eroded[1:-1, 1:-1]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.001, 0.02, 0.1, 0.5]))
def test_boundary_iou_is_that_of_whole_images(height, width, seed, dilation):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]

    def blob() -> np.ndarray:
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(1, max(height, width))
        return (
            ((y - cy) ** 2 + (x - cx) ** 2 < r**2) & (rng.random((height, width)) < rng.choice([1.0, 0.97]))
        ).astype(np.uint8)

    first, second = blob(), blob()
    rles = [
        masks.rle(masks.encode(m, Window(0, 0, width, height), height, width), height, width) for m in (first, second)
    ]
    a, b = plain_boundary(first, dilation), plain_boundary(second, dilation)
    union = np.count_nonzero(a | b)
    expected = np.count_nonzero(a & b) / union if union else 0.0
    assert masks.boundary_iou(*rles, dilation) == pytest.approx(expected, abs=1e-12)


def test_boundary_iou_of_known_masks():
    """On a 300 x 400 image the boundary is 10 pixels wide: 2 % of a diagonal of 500."""
    box = masks.from_segmentation([[100, 100, 200, 100, 200, 200, 100, 200]], 300, 400)
    whole = masks.from_segmentation({"size": [300, 400], "counts": [0, 300 * 400]}, 300, 400)
    nothing = masks.from_segmentation({"size": [300, 400], "counts": [300 * 400]}, 300, 400)
    hollow = masks.decode(box["counts"], 300, 400)
    hollow[110:190, 110:190] = 0
    ring = masks.rle(masks.encode(hollow, Window(0, 0, 400, 300), 300, 400), 300, 400)
    assert masks.boundary_iou(box, box) == masks.boundary_iou(whole, whole) == 1.0
    assert masks.boundary_iou(box, ring) == 1.0  # the same outline, though the masks' IoU is 0.36
    assert masks.iou(box, ring) == pytest.approx(0.36)
    assert masks.boundary_iou(nothing, nothing) == masks.boundary_iou(box, nothing) == 0.0
    assert masks.boundary_iou(whole, box) == 0.0  # the image's border counts, far from the box's
    with pytest.raises(InputError, match="different images"):
        masks.boundary_iou(box, masks.rle(box["counts"], 400, 300))
