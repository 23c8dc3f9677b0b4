"""The table of every box of an evaluation, and the figures that are made of it."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mal import rows
from mal.evaluation.box_table import BOXES, box_table, write_box_table
from mal.evaluation.launch import scores


@pytest.fixture
def shards(tmp_path):
    """Two shards: boxes of known IoU, one that leaves its image, one without a true mask, and one rejected."""
    same = {"image_id": 7, "clipped": False, "file_name": "ü, a.png", "height": 100, "width": 200, "model": "m"}
    known = [(1, [0, 0, 10, 10], 0.9, 0.5), (1, [0, 0, 50, 50], 0.2, 0.1), (3, [150, 0, 100, 100], 0.6, 0.4)]
    labels = [
        {**same, "category_id": category, "bbox": bbox, "iou": iou, "boundary_iou": boundary, "quality": 0.5, "area": 9}
        for category, bbox, iou, boundary in known
    ]
    labels += [{**same, "category_id": 3, "bbox": [1, 1, 2, 2], "quality": 0.25, "score": 0.75, "area": 1}]
    labels += [{**same, "category_id": 3, "bbox": [1, 1, 2, 2], "reason": "missing_image"}]
    paths = []
    for part in (slice(0, 2), slice(2, 5)):
        numbered = [row | {"position": k, "id": 100 + k} for k, row in enumerate(labels)][part]
        paths.append(str(tmp_path / f"part-{part.start}.parquet"))
        pq.write_table(pa.Table.from_pylist(numbered, schema=rows.LABELS), paths[-1])
    return paths


def test_the_worst_come_first_and_no_box_is_left_out(shards):
    table = box_table(shards, {1: "cat"})
    assert table.schema == BOXES
    assert table["id"].to_pylist() == [101, 102, 100, 103, 104]
    worst, clipped, _, unknown, rejected = table.to_pylist()
    assert (worst["category"], worst["band"], worst["iou"], worst["w"]) == ("cat", "medium", 0.2, 50.0)
    assert (clipped["category"], clipped["band"], clipped["w"], clipped["box_area"]) == ("3", "medium", 100.0, 5000.0)
    assert (unknown["iou"], unknown["score"], unknown["quality"]) == (None, 0.75, 0.25)
    assert (rejected["reason"], rejected["mask_area"]) == ("missing_image", None)


def test_it_is_written_as_asked_and_comes_back(shards, tmp_path):
    table = box_table(shards, {1: "cat, wild"})
    paths = write_box_table(table, str(tmp_path), "both")
    assert [path.rpartition("/")[2] for path in paths] == ["boxes.parquet", "boxes.csv"]
    assert pq.read_table(paths[0]) == table
    read = pyarrow.csv.read_csv(paths[1])
    assert read.column_names == BOXES.names
    assert read["file_name"].to_pylist() == ["ü, a.png"] * 5
    assert read["iou"].to_pylist() == table["iou"].to_pylist()
    for form in ("parquet", "csv"):
        assert write_box_table(table, str(tmp_path), form) == [str(tmp_path / f"boxes.{form}")]


def test_scores_of_masks_and_of_boundaries(shards):
    table = box_table(shards, {})
    masks, boundaries = scores(table, "iou").result(), scores(table, "boundary_iou").result()
    assert math.isclose(masks["mIoU"] or 0, (0.55 + 0.6) / 2)
    assert math.isclose(masks["box_mean_iou"] or 0, 1.7 / 3)
    assert math.isclose(boundaries["mIoU"] or 0, (0.3 + 0.4) / 2)
    assert math.isclose(boundaries["mIoU_medium"] or 0, (0.1 + 0.4) / 2)
    assert masks["counts"] == boundaries["counts"] == {"boxes": 3, "small": 1, "medium": 2, "large": 0}


def test_a_file_without_boxes():
    assert box_table([], {}).num_rows == 0
