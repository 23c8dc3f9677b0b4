"""Pictures: what is drawn is where the masks and boxes are, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mal import masks
from mal.boxes import Window
from mal.pictures import Tile, colour, label, overlay, picture_sheet

GREY = np.full((40, 60, 3), 128, dtype=np.uint8)


def _mask() -> np.ndarray:
    mask = np.zeros((40, 60), dtype=bool)
    mask[20:35, 10:30] = True
    return mask


def test_mask_is_tinted_its_rim_solid_the_rest_unchanged() -> None:
    drawn = overlay(GREY, [_mask()])
    assert np.array_equal(drawn[~_mask()], GREY[~_mask()])
    assert tuple(drawn[20, 15]) == tuple(drawn[34, 29]) == colour(0)
    inner = drawn[22:33, 12:28].reshape(-1, 3)
    assert len(np.unique(inner, axis=0)) == 1
    low, high = np.minimum(128, colour(0)), np.maximum(128, colour(0))
    assert np.all((inner[0] > low) & (inner[0] < high))
    assert GREY.min() == GREY.max() == 128


def test_rle_and_array_give_the_same_picture() -> None:
    rle = masks.rle(masks.encode(_mask(), Window(0, 0, 60, 40), 40, 60), 40, 60)
    assert np.array_equal(overlay(GREY, [rle]), overlay(GREY, [_mask()]))


def test_box_frames_its_pixels() -> None:
    drawn = overlay(GREY, boxes=[[5, 6, 20, 10]])
    changed = np.argwhere((drawn != GREY).any(axis=2))
    assert changed.min(axis=0).tolist() == [6, 5]
    assert changed.max(axis=0).tolist() == [15, 24]
    assert len(changed) == 2 * 20 + 2 * 8


def test_objects_without_mask_keep_their_colour_and_label() -> None:
    drawn = overlay(GREY, [None, _mask()], [[2, 20, 5, 5], [10, 20, 20, 15]], ["a", "b"])
    assert tuple(drawn[30, 10]) == colour(1)
    assert tuple(drawn[22, 2]) == colour(0)


@pytest.mark.parametrize("corner", [(-3.0, -2.0), (0.0, 0.0), (55.5, 38.0), (30.0, 0.4)])
def test_a_label_is_readable_wherever_the_box_is(corner: tuple[float, float]) -> None:
    def plate(x: float, y: float) -> np.ndarray:
        drawn = overlay(np.zeros((60, 200, 3), dtype=np.uint8), boxes=[[x, y, 4, 4]], labels=["fish 81"])
        return np.count_nonzero((drawn == colour(0)).all(axis=2))

    # The plate's pixels, less those of its letters, are as many as for a box in the middle.
    assert abs(int(plate(*corner)) - int(plate(80.0, 30.0))) <= 16


def test_wrong_mask_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask 0"):
        overlay(GREY, [_mask().T])


def test_colours_of_neighbours_differ() -> None:
    colours = np.array([colour(k) for k in range(30)], dtype=float)
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 150
    assert len(np.unique(colours, axis=0)) == 30


def test_label_text() -> None:
    assert label("fish") == label("fish", float("nan")) == "fish"
    assert label("fish", 0.876) == "fish 88"


def test_sheet_has_every_tile_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    reds = [Tile(np.full((30, 50, 3), (40 * k, 0, 0), dtype=np.uint8), title="x" if k < 2 else "") for k in range(5)]
    picture_sheet(reds, str(path), columns=2, tile_width=100)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * 100 + 3 * 6
    columns = [6 + 50, 6 + 100 + 6 + 50]
    titled, plain = 17 + 60, 60
    rows = [6 + 17 + 30, 6 + titled + 6 + 30, 6 + titled + 6 + plain + 6 + 30]
    assert sheet.shape[0] == 6 + titled + 6 + plain + 6 + plain + 6
    assert [int(sheet[rows[k // 2], columns[k % 2], 0]) for k in range(5)] == [0, 40, 80, 120, 160]
    assert tuple(sheet[rows[2], columns[1]]) == (255, 255, 255)
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_scales_masks_and_boxes_with_the_image(tmp_path: Path) -> None:
    picture_sheet([Tile(GREY, [_mask()], [[10, 20, 20, 15]])], str(tmp_path / "s.png"), columns=3, tile_width=120)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (80 + 12, 120 + 12, 3)
    changed = np.argwhere((sheet[6:-6, 6:-6] != 128).any(axis=2))
    assert np.abs(changed.min(axis=0) - [40, 20]).max() <= 1
    assert np.abs(changed.max(axis=0) - [69, 59]).max() <= 1


def test_an_empty_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiles"):
        picture_sheet([], str(tmp_path / "s.png"))
