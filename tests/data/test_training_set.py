"""The samples of training: which boxes, what a sample holds, and what becomes of images that cannot be read."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from mal import boxes, crops, rows
from mal.data import images
from mal.data.augment import draw_change, sample_generator
from mal.data.index import build_index
from mal.data.sampler import OffsetSampler
from mal.data.scenes import write_scenes
from mal.data.training_set import TrainingSet, collect_boxes, load_training_boxes
from mal.errors import InputError


def _box(number: int, bbox: list[float]) -> dict[str, Any]:
    return {"position": number, "id": 100 + number, "category_id": 1, "bbox": bbox, "clipped": False}


def _table(records: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(records, schema=rows.INDEX)


def _image(number: int, bboxes: list[list[float]], size: tuple[int, int] = (320, 240)) -> dict[str, Any]:
    return {
        "image_id": number,
        "file_name": f"{number:06d}.jpg",
        "width": size[0],
        "height": size[1],
        "boxes": [_box(10 * number + k, bbox) for k, bbox in enumerate(bboxes)],
    }


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), images=6, seed=1)
    return folder


@pytest.fixture(scope="module")
def index(scenes_folder: Path) -> pa.Table:
    document = json.loads((scenes_folder / "annotations.json").read_text())
    return _table(
        [
            _image(r["id"], [a["bbox"] for a in document["annotations"] if a["image_id"] == r["id"]])
            for r in document["images"]
        ]
    )


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _set(folder: Path, index: pa.Table, seed: int = 3, size: int = 64, **options: Any) -> TrainingSet:
    return TrainingSet(
        collect_boxes([index], 2048, 1e10),
        image_folder=str(folder / "images"),
        crop_size=size,
        margin_rate=(0.0, 1.2),
        seed=seed,
        max_image_pixels=10**6,
        **options,
    )


def test_boxes_within_the_limits_are_kept_and_the_others_counted() -> None:
    first = _table([_image(1, [[0, 0, 64, 32], [0, 0, 64, 33], [10, 10, 2, 200]]), _image(2, [])])
    second = _table([_image(3, [[300.5, 200, 100, 100], [5, 5, 20, 20], [0, 0, 320, 240]], (320, 240))])
    found = collect_boxes([first, second], 2048, 76800)
    assert found.ids.tolist() == [111]
    assert found.left_out == {"small": 2, "medium": 1, "large": 1, "thin": 1}
    assert len(found) + sum(found.left_out.values()) == 6
    assert "1 boxes of 1 images" in str(found)
    assert "1 thin" in str(found)


def test_boxes_are_clipped_and_stay_with_their_image() -> None:
    tables = [_table([_image(k, [[-10.5, 20, 100.5, 500]])]) for k in (4, 5, 6)]
    found = collect_boxes(tables, 0, 1e10)
    assert found.corners.tolist() == [[0, 20, 90, 240]] * 3
    assert [found.file_names[int(k)].as_py() for k in found.image] == ["000004.jpg", "000005.jpg", "000006.jpg"]
    assert found.sizes[found.image].tolist() == [[320, 240]] * 3


def test_clipping_is_that_of_boxes() -> None:
    rng = np.random.default_rng(0)
    bboxes = [[*rng.uniform(-100, 300, 2), *rng.uniform(3, 200, 2)] for _ in range(100)]
    inside = [boxes.clip(boxes.from_xywh(b), 320, 240) for b in bboxes]
    expected = [b for b in inside if b is not None and min(b.x1 - b.x0, b.y1 - b.y0) > 2]
    found = collect_boxes([_table([_image(1, bboxes)])], 0, 1e10)
    np.testing.assert_array_equal(found.corners, np.array(expected, dtype=np.float32))


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(InputError, match=r"0 boxes.*1 small.*min_obj_size is 2048"):
        collect_boxes([_table([_image(1, [[5, 5, 20, 20]])])], 2048, 1e10)
    with pytest.raises(InputError, match="0 boxes"):
        collect_boxes([], 2048, 1e10)


def test_slices_of_a_table_are_read_right(index: pa.Table) -> None:
    parts = collect_boxes([index.slice(0, 2), index.slice(2, 3), index.slice(5)], 2048, 1e10)
    whole = collect_boxes([index], 2048, 1e10)
    assert np.array_equal(parts.corners, whole.corners)
    assert np.array_equal(parts.image, whole.image)
    assert parts.file_names.equals(whole.file_names)
    assert collect_boxes([pa.concat_tables([index.slice(0, 2), index.slice(2)])], 2048, 1e10).ids.tolist() == (
        whole.ids.tolist()
    )


def test_a_sample_is_the_crop_of_its_window(scenes_folder: Path, index: pa.Table) -> None:
    data = _set(scenes_folder, index)
    kept = collect_boxes([index], 2048, 1e10)
    flips = 0
    for k in range(len(data)):
        sample = data[(2, k)]
        rng = sample_generator(3, 2, k)
        box = boxes.Box(*kept.corners[k].astype(float))
        window = boxes.train_window(box, (0.0, 1.2), rng)
        name = kept.file_names[int(kept.image[k])].as_py()
        image = images.decode(str(scenes_folder / "images" / name), expected=(320, 240), max_pixels=10**6)
        plain = crops.resize(crops.cut(image, window), 64)
        box_mask = crops.box_mask(window, box, 320, 240, 64)
        if rng.random() < 0.5:
            plain, box_mask, flips = plain[:, ::-1], box_mask[:, ::-1], flips + 1
        crop = sample["crop"].permute(1, 2, 0).numpy()
        assert np.array_equal(crop, plain)
        assert np.array_equal(sample["change"].numpy(), draw_change(rng))
        assert np.array_equal(sample["box_mask"].numpy(), box_mask)
        assert sample["crop"].shape == (3, 64, 64)
        assert sample["crop"].dtype == sample["box_mask"].dtype == torch.uint8
        assert all(sample[name].is_contiguous() for name in ("crop", "box_mask"))
        assert float(sample["area"]) == boxes.area(box)
        assert int(sample["id"]) == kept.ids[k]
    assert 0 < flips < len(data)


def test_augmentation_and_gate_are_handed_on(scenes_folder: Path, index: pa.Table) -> None:
    plain = _set(scenes_folder, index, augmentation=0.0, margin_gate=False)
    kept = collect_boxes([index], 2048, 1e10)
    for k in range(5):
        sample = plain[(0, k)]
        assert np.array_equal(sample["change"].numpy(), draw_change(np.random.default_rng(0), strength=0.0))
        box = boxes.Box(*kept.corners[k].astype(float))
        window = boxes.train_window(box, (0.0, 1.2), sample_generator(3, 0, k), gate=False)
        shown = crops.box_mask(window, box, 320, 240, 64)
        assert any(np.array_equal(sample["box_mask"].numpy(), m) for m in (shown, shown[:, ::-1]))


def test_samples_depend_on_seed_epoch_and_index_alone(scenes_folder: Path, index: pa.Table) -> None:
    data = _set(scenes_folder, index)
    first = [data[(0, k)] for k in range(8)]
    copy = pickle.loads(pickle.dumps(data))
    again = [copy[(0, k)] for k in reversed(range(8))][::-1]
    for a, b in zip(first, again, strict=True):
        assert _equal(a, b)
    assert not torch.equal(data[(1, 0)]["crop"], first[0]["crop"])
    assert not torch.equal(_set(scenes_folder, index, seed=4)[(0, 0)]["crop"], first[0]["crop"])


def test_loading_processes_give_the_same_batches(scenes_folder: Path, index: pa.Table) -> None:
    data = _set(scenes_folder, index)

    def batches(processes: int) -> list[dict[str, torch.Tensor]]:
        sampler = OffsetSampler(len(data), batch_size=4, rank=0, workers=2, seed=0)
        return list(DataLoader(data, batch_size=4, sampler=sampler, num_workers=processes))

    here, there = batches(0), batches(2)
    assert len(here) == len(there) > 1
    for a, b in zip(here, there, strict=True):
        assert a["crop"].shape == (4, 3, 64, 64)
        assert _equal(a, b)


def test_an_unreadable_image_is_replaced_and_named_once(
    scenes_folder: Path, index: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    broken = index.to_pylist()
    broken[2]["file_name"] = "gone.jpg"
    data = _set(scenes_folder, _table(broken))
    kept = collect_boxes([index], 2048, 1e10)
    lost = np.flatnonzero(kept.image == 2)
    assert len(lost) > 1
    with caplog.at_level(logging.WARNING):
        samples = [data[(0, int(k))] for k in lost]
    assert {int(s["id"]) for s in samples} == {int(kept.ids[lost[-1] + 1])}
    assert len([r for r in caplog.records if "gone.jpg" in r.getMessage()]) == 1
    assert not torch.equal(samples[0]["crop"], samples[1]["crop"])
    assert int(data[(0, 0)]["id"]) == kept.ids[0]


def test_the_last_box_is_replaced_by_the_first(scenes_folder: Path, index: pa.Table) -> None:
    broken = index.to_pylist()
    broken[-1]["file_name"] = "../outside.jpg"
    data = _set(scenes_folder, _table(broken))
    assert int(data[(0, len(data) - 1)]["id"]) == int(data[(0, 0)]["id"])


def test_training_ends_when_no_image_can_be_read(tmp_path: Path, index: pa.Table) -> None:
    with pytest.raises(InputError, match="6 images of 1 samples"):
        _set(tmp_path, index)[(0, 0)]


def test_training_ends_when_most_images_cannot_be_read(scenes_folder: Path, index: pa.Table) -> None:
    broken = index.to_pylist()
    for record in broken[:4]:
        record["file_name"] = "gone-" + record["file_name"]
    data = _set(scenes_folder, _table(broken), size=16)
    for k in range(99):
        data[(0, k % len(data))]
    with pytest.raises(InputError, match=r"Most training images.*dataset.train_img_dir"):
        data[(0, 0)]


def test_a_search_for_a_readable_image_is_not_endless(tmp_path: Path) -> None:
    many = _table([_image(k, [[0, 0, 100, 100]]) for k in range(500)])
    with pytest.raises(InputError, match="100 images of 1 samples"):
        _set(tmp_path, many)[(0, 7)]


def test_an_index_on_disk_gives_the_same_boxes(scenes_folder: Path, index: pa.Table, tmp_path: Path) -> None:
    build_index(str(scenes_folder / "annotations.json"), str(tmp_path), shard_boxes=5)
    found = load_training_boxes(str(tmp_path), 2048, 1e10)
    whole = collect_boxes([index], 2048, 1e10)
    assert found.left_out == whole.left_out
    assert np.array_equal(found.corners, whole.corners)
    assert [found.file_names[int(k)] for k in found.image] == [whole.file_names[int(k)] for k in whole.image]
