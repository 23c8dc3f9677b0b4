"""From shards to the COCO file and the ledger: polygons, quality, low quality. Without Ray."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mal import masks, rows
from mal.boxes import Window
from mal.data.index import build_index
from mal.inference.merge import OutputOptions, merge

HEIGHT, WIDTH = 60, 80


def _disc(radius: float) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (x - 40) ** 2 + (y - 30) ** 2 < radius**2


DISCS = [_disc(25), _disc(12), _disc(0), _disc(20)]
QUALITY = [0.9, 0.4, 0.0, None]


def _row(position: int) -> dict[str, object]:
    mask = DISCS[position]
    return {
        "position": position,
        "id": 10 + position,
        "image_id": 1,
        "category_id": 1,
        "bbox": [0.0, 0.0, 80.0, 60.0],
        "score": 0.5 + position / 10,
        "clipped": position == 1,
        "carried": '{"quality": 7, "low_quality": true, "note": "kept"}' if position == 0 else None,
        "file_name": "a.png",
        "height": HEIGHT,
        "width": WIDTH,
        "counts": masks.encode(mask, Window(0, 0, WIDTH, HEIGHT), HEIGHT, WIDTH),
        "area": int(mask.sum()),
        "quality": QUALITY[position],
        "model": "m",
    }


@pytest.fixture
def merged(tmp_path):
    """Merges four discs with the given options; returns the annotations by id, the ledger by id, and the counts."""
    images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    boxes = [{"id": 10 + k, "image_id": 1, "category_id": 1, "bbox": [0, 0, 80, 60]} for k in range(4)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    index = build_index(
        str(tmp_path / "boxes.json"),
        str(tmp_path / "index"),
        images_path=None,
        load_mask=False,
        shard_boxes=0,
        max_image_pixels=10**6,
        progress=lambda _: None,
    )
    pq.write_table(pa.Table.from_pylist([_row(k) for k in range(4)], schema=rows.LABELS), tmp_path / "part.parquet")

    def run(**options: object):
        labels, ledger = tmp_path / "labels.json", tmp_path / "ledger.parquet"
        shards = [str(tmp_path / "part.parquet")]
        counts = merge(index, shards, str(labels), str(ledger), OutputOptions(**options))
        found = {a["id"]: a for a in json.loads(labels.read_text())["annotations"]}
        booked = {row["id"]: row for row in pq.read_table(ledger).to_pylist()}
        assert counts.total == len(booked) == 4
        return found, booked, counts, labels

    return run


def test_by_default_rles_and_no_quality(merged):
    found, booked, counts, _ = merged()
    assert set(found) == {10, 11, 12, 13}
    for annotation, disc in zip(found.values(), DISCS, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), disc)
        assert not {"quality", "low_quality"} & set(annotation) or annotation["id"] == 10
    assert found[10]["note"] == "kept"
    assert found[11]["score"] == pytest.approx(0.6)
    assert (counts.labelled, counts.clipped, counts.low_quality) == (3, 1, 0)
    assert {row["reason"] for row in booked.values()} == {None}


def test_polygons_and_an_rle_for_the_empty_mask(merged):
    found, _, _, path = merged(polygons=True)
    assert [isinstance(a["segmentation"], list) for a in found.values()] == [True, True, False, True]
    coco = COCO(str(path))
    for annotation, disc in zip(found.values(), DISCS, strict=True):
        back = coco.annToMask(annotation)
        assert annotation["area"] == disc.sum()
        union = (back | disc).sum()
        assert not union or (back & disc).sum() / union >= 0.98


def test_the_inputs_own_fields_give_way_only_to_ours_of_the_same_name(merged):
    """An annotation of the input has a quality and a low_quality, of an earlier labelling or of another tool."""

    def kept(**options):
        found, *_ = merged(**options)
        return {name: found[10].get(name) for name in ("quality", "low_quality", "note")}

    assert kept() == {"quality": 7, "low_quality": True, "note": "kept"}
    assert kept(dump_quality=True) == {"quality": pytest.approx(0.9), "low_quality": True, "note": "kept"}
    assert kept(min_quality=0.5) == {"quality": 7, "low_quality": None, "note": "kept"}
    assert kept(min_quality=0.5, drop_low_quality=True) == {"quality": 7, "low_quality": True, "note": "kept"}


def test_quality_on_request(merged):
    found, *_ = merged(dump_quality=True)
    assert [a.get("quality") for a in found.values()] == [pytest.approx(0.9), pytest.approx(0.4), 0.0, None]


def test_low_quality_is_marked_and_counted(merged):
    found, booked, counts, _ = merged(min_quality=0.5)  # of the input's own marks none is left
    assert [k for k, a in found.items() if a.get("low_quality")] == [11, 12]
    assert (counts.labelled, counts.clipped, counts.low_quality, counts.rejected.total()) == (3, 1, 2, 0)
    assert (booked[11]["outcome"], booked[11]["reason"]) == ("clipped", "low_quality: 0.4")
    assert booked[13]["reason"] is None  # a quality that is not known is not low


def test_low_quality_is_dropped_and_counted(merged):
    found, booked, counts, _ = merged(min_quality=0.5, drop_low_quality=True)
    assert set(found) == {10, 13}
    assert counts.rejected == {"low_quality": 2}
    assert (counts.labelled, counts.clipped, counts.low_quality) == (2, 0, 0)
    assert booked[12]["outcome"] == "rejected"


def test_a_reason_of_several_lines_is_counted_under_its_code(tmp_path):
    wrong = {"id": "a\nb: c", "image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 6]}
    (tmp_path / "in.json").write_text(json.dumps({"images": [], "annotations": [wrong], "categories": []}))
    index = build_index(str(tmp_path / "in.json"), str(tmp_path / "index"))
    counts = merge(index, [], str(tmp_path / "labels.json"), str(tmp_path / "ledger.parquet"))
    assert counts.rejected == index.summary.rejected == {"bad_id": 1}
    (booked,) = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert booked["reason"] == "bad_id: a\nb: c"


def test_a_quality_at_the_limit_is_not_low(merged):
    found, *_ = merged(min_quality=0.9)  # 0.9 in float32 is not 0.9 in float64
    assert "low_quality" not in found[10]
