"""One shard without Ray: every box has one row, whatever its image is like."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from mal import boxes, masks, rows
from mal.labelling.shard import label_rows, rejected_rows
from mal.labelling.task import make_task
from mal.predictor import Predictor
from mal.spec.load import load_spec


class Everything(nn.Module):
    """Says mask everywhere; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []

    def forward(self, images: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
        self.batches.append(areas.tolist())
        return torch.full((len(images), 8, 8), 9.0)


def _box(position: int, bbox: list[float], **more: object) -> dict[str, object]:
    plain = {"score": None, "clipped": False, "segmentation": None, "carried": None}
    return {"position": position, "id": 100 + position, "category_id": 1, "bbox": bbox, **plain, **more}


def _index(images: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(images, schema=rows.INDEX)


@pytest.fixture
def line(tmp_path):
    """Labels index rows in ``tmp_path`` with a network that says mask everywhere."""
    network = Everything()
    spec = load_spec(None, ["dataset.crop_size=32", "inference.batch_size=4"])
    task = make_task(
        spec,
        spec.inference,
        folder=str(tmp_path),
        img_dir=str(tmp_path),
        checkpoint="",
        model_id="m",
        load_mask=True,
        gpu=False,
    )

    def label(index: pa.Table) -> list[dict[str, object]]:
        with ThreadPoolExecutor(2) as pool:
            labels = label_rows(task, Predictor(network, crop_size=32), pool, index)
        assert labels.schema == rows.LABELS
        return labels.to_pylist()

    label.network, label.task = network, task
    return label


def _image(folder, name: str, width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)


def test_every_box_has_one_row_in_order_and_its_mask_fills_its_box(line, tmp_path):
    _image(tmp_path, "a.png", 60, 40)
    bboxes = [[5, 5, 20, 10], [-4, -4, 10, 12], [50.5, 30.5, 30, 30], [0, 0, 60, 40], [10, 10, 1.5, 1.5]]
    index = _index(
        [
            {
                "image_id": 7,
                "file_name": "a.png",
                "width": 60,
                "height": 40,
                "boxes": [_box(k, b) for k, b in enumerate(bboxes)],
            }
        ]
    )
    found = line(index)
    assert [row["position"] for row in found] == list(range(5))
    assert all(row["reason"] is None and row["model"] == "m" for row in found)
    for row, bbox in zip(found, bboxes, strict=True):
        assert row["bbox"] == bbox
        mask = masks.decode(row["counts"], 40, 60)
        assert mask.sum() == row["area"]
        window = boxes.outer_pixels(boxes.clip(boxes.from_xywh(bbox), 60, 40), 60, 40)
        inside = mask[window.y0 : window.y1, window.x0 : window.x1]
        assert inside.sum() == mask.sum()
        assert inside.mean() > 0.8


def test_an_image_that_cannot_be_used_rejects_its_boxes_and_no_others(line, tmp_path):
    _image(tmp_path, "good.png", 40, 40)
    _image(tmp_path, "small.png", 20, 20)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    names = ["missing.png", "good.png", "broken.png", "small.png", "../outside.png"]
    index = _index(
        [
            {"image_id": k, "file_name": n, "width": 40, "height": 40, "boxes": [_box(k, [1, 1, 30, 30])]}
            for k, n in enumerate(names)
        ]
    )
    codes = [None if row["reason"] is None else str(row["reason"]).partition(":")[0] for row in line(index)]
    assert codes == ["missing_image", None, "unreadable_image", "size_differs", "unsafe_path"]
    assert set(filter(None, codes)) <= set(rows.REASONS)


def test_boxes_of_one_band_share_batches_and_the_rest_is_not_padded(line, tmp_path):
    _image(tmp_path, "a.png", 200, 200)
    small, large = [[1, 1, 10, 10]] * 5, [[0, 0, 150, 150]] * 6
    bboxes = [box for pair in zip(large, [*small, [2, 2, 9, 9]], strict=True) for box in pair]
    index = _index(
        [
            {
                "image_id": 1,
                "file_name": "a.png",
                "width": 200,
                "height": 200,
                "boxes": [_box(k, b) for k, b in enumerate(bboxes)],
            }
        ]
    )
    assert len(line(index)) == 12
    sizes = [len(batch) for batch in line.network.batches]
    assert sizes == [4, 4, 4]
    bands = [set(boxes.band_index(batch).tolist()) for batch in line.network.batches[:2]]
    assert all(len(band) == 1 for band in bands)


def test_the_iou_with_the_inputs_mask_is_measured(line, tmp_path):
    _image(tmp_path, "a.png", 40, 40)
    left_half = json.dumps([[10, 10, 20, 10, 20, 30, 10, 30]])
    index = _index(
        [
            {
                "image_id": 1,
                "file_name": "a.png",
                "width": 40,
                "height": 40,
                "boxes": [_box(0, [10, 10, 20, 20], segmentation=left_half), _box(1, [10, 10, 20, 20])],
            }
        ]
    )
    first, second = line(index)
    assert first["iou"] == pytest.approx(0.5, abs=0.06)
    assert second["iou"] is None


def test_rejected_rows_need_no_image(line):
    record = {"image_id": 1, "file_name": "absent.png", "width": 40, "height": 40}
    index = _index([{**record, "boxes": [_box(0, [1, 1, 9, 9]), _box(1, [2, 2, 9, 9])]}])
    rejected = rejected_rows(line.task, index, "crashed").to_pylist()
    assert [row["position"] for row in rejected] == [0, 1]
    assert {row["reason"] for row in rejected} == {"crashed"}
    assert {row["counts"] for row in rejected} == {None}


def test_a_mask_of_the_input_that_is_broken_costs_the_comparison_and_not_the_box(line, tmp_path):
    _image(tmp_path, "a.png", 40, 40)
    broken = [_box(0, [10, 10, 20, 20], segmentation="[[1, 2]]"), _box(1, [10, 10, 20, 20], segmentation='{"size": 1}')]
    found = line(_index([{"image_id": 1, "file_name": "a.png", "width": 40, "height": 40, "boxes": broken}]))
    assert [(row["reason"], row["iou"]) for row in found] == [(None, None)] * 2
    assert all(row["area"] > 0 for row in found)


def test_a_batch_too_large_for_the_device_goes_through_in_parts(line, tmp_path):
    _image(tmp_path, "a.png", 100, 100)

    def forward(images: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("too much")
        return torch.full((len(images), 8, 8), 9.0)

    line.network.forward = forward
    bboxes = [_box(k, [k, k, 20, 20]) for k in range(6)]
    found = line(_index([{"image_id": 1, "file_name": "a.png", "width": 100, "height": 100, "boxes": bboxes}]))
    assert [row["position"] for row in found] == list(range(6))
    assert all(row["area"] > 0 for row in found)
