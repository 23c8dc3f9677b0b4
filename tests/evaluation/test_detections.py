"""COCO average precision by faster-coco-eval, compared with pycocotools."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mal import masks, rows
from mal.boxes import Window
from mal.errors import InputError
from mal.evaluation.detections import FIGURES, _figures, average_precision, format_precision

SIDE = 260


def _ellipse(x: float, y: float, w: float, h: float) -> str:
    rows_, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows_ - y - h / 2) / (h / 2)) ** 2 <= 1
    return masks.encode(inside, Window(0, 0, SIDE, SIDE), SIDE, SIDE)


@pytest.fixture
def files(tmp_path):
    """True ellipses on 12 images with crowds among them; detections near them, wrong ones, and a rejected one."""
    rng = np.random.default_rng(3)
    truth, found = [], []
    for image in range(12):
        for _ in range(5):
            x, y, w, h = rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(8, 160), rng.uniform(8, 160)
            counts, category = _ellipse(x, y, w, h), int(rng.integers(1, 4))
            entry = {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "id": len(truth) + 1}
            area = masks.area(counts, SIDE, SIDE)
            crowd = int(rng.random() < 0.1)
            truth.append({**entry, "segmentation": masks.rle(counts, SIDE, SIDE), "area": area, "iscrowd": crowd})
            for _ in range(int(rng.integers(0, 3))):
                nx, ny, nw, nh = (float(v) for v in np.array([x, y, w, h]) + rng.normal(0, 3, 4))
                box = [nx, ny, max(nw, 3.0), max(nh, 3.0)]
                found.append({**entry, "bbox": box, "score": float(rng.random()), "counts": _ellipse(*box)})
    for position, row in enumerate(found):
        fixed = {"clipped": False, "file_name": "a", "height": SIDE, "width": SIDE, "model": "m"}
        row.update(position=position, id=position, **fixed)
    found[0]["counts"] = None
    path, shard = tmp_path / "truth.json", tmp_path / "part.parquet"
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(12)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    path.write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    pq.write_table(pa.Table.from_pylist(found, schema=rows.LABELS), shard)
    return str(path), str(shard), found


def test_figures_are_those_of_pycocotools(files):
    truth, shard, found = files
    ours = average_precision(truth, [shard])
    for kind in ("bbox", "segm"):
        results = [
            # Of a mask's result pycocotools would take the area of a box that stands beside it.
            {k: row[k] for k in ("image_id", "category_id", "score")}
            | ({"bbox": row["bbox"]} if kind == "bbox" else {"segmentation": masks.rle(row["counts"], SIDE, SIDE)})
            for row in found[1:]
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            objects = COCO(truth)
            evaluation = COCOeval(objects, objects.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert list(ours[kind].values()) == pytest.approx(list(evaluation.stats[: len(FIGURES)]), abs=1e-9)
        assert 0.05 < ours[kind]["AP"] < 0.95
        assert None not in ours[kind].values()
    assert f"{100 * ours['segm']['AP']:.2f}" in format_precision(ours)


def test_masks_are_small_medium_or_large_by_their_own_area():
    """A thin mask in a large box is a small one: a wrong one counts against small objects."""
    thin, box = np.eye(60, dtype=bool), np.ones((20, 20), dtype=bool)
    wrong, right = (
        masks.rle(masks.encode(mask, Window(x, x, x + len(mask), x + len(mask)), SIDE, SIDE), SIDE, SIDE)
        for mask, x in ((thin, 100), (box, 10))
    )
    one = {"image_id": 1, "category_id": 1}
    truth = {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{**one, "id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "segmentation": right}],
    }
    results = [
        {**one, "bbox": [100, 100, 60, 60], "score": 0.9, "segmentation": wrong},
        {**one, "bbox": [10, 10, 20, 20], "score": 0.5, "segmentation": right},
    ]
    figures = _figures(truth, results, "segm")
    assert figures["AP"] == figures["AP_small"] == pytest.approx(0.5, abs=0.01)
    assert _figures(truth, results, "bbox")["AP_small"] == pytest.approx(1.0, abs=0.01)


def test_boxes_without_scores_are_refused(files, tmp_path):
    truth, _, found = files
    shard = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist([{**found[1], "score": None}], schema=rows.LABELS), shard)
    with pytest.raises(InputError, match="no scores"):
        average_precision(truth, [str(shard)])
