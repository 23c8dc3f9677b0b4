"""The files that a merge writes: compressed ones, many shards, and nothing in memory that grows."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mal import masks, rows
from mal.boxes import Window
from mal.data.index import build_index
from mal.inference.merge import merge


@pytest.fixture
def run(tmp_path):
    """Merges 40 boxes in shards of 6, a crowd and rejected boxes among them, into a path; returns the counts."""
    images = [{"id": k, "file_name": f"{k}.png", "width": 9, "height": 8} for k in range(10)]
    boxes = [{"id": k, "image_id": k % 10, "category_id": 1, "bbox": [1, 1, 4, 4]} for k in range(40)]
    boxes[7]["bbox"] = [1, 1, -4, 4]
    boxes[8] |= {"iscrowd": 1, "segmentation": {"size": [8, 9], "counts": [0, 72]}}
    (tmp_path / "in.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": []}))
    index = build_index(str(tmp_path / "in.json"), str(tmp_path / "index"), shard_boxes=6)
    counts = masks.encode(np.ones((4, 4), np.uint8), Window(1, 1, 5, 5), 8, 9)
    paths = []
    for shard in range(index.shards):
        found = []
        for row in index.read_shard(shard).to_pylist():
            for box in row["boxes"]:
                reason = "missing_image: x: y" if box["id"] == 20 else None
                found.append({**row, **box, "model": "m", "counts": counts if reason is None else None, "area": 16})
                found[-1]["reason"] = reason
                found[-1].pop("boxes")
        table = pa.Table.from_pylist(found, schema=rows.LABELS)
        paths.append(str(tmp_path / f"{shard}.parquet"))
        pq.write_table(table, paths[-1])
    return lambda path: merge(index, paths, str(path), str(tmp_path / "ledger.parquet"))


def test_a_compressed_file_holds_the_same_and_the_same_bytes_each_time(run, tmp_path):
    counts = run(tmp_path / "labels.json")
    run(tmp_path / "a.json.gz")
    run(tmp_path / "b.json.gz")
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "labels.json").read_bytes()
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert counts.labelled == 37
    assert counts.crowd == 1
    assert counts.rejected == {"empty_box": 1, "missing_image": 1}


def test_every_box_is_in_the_file_or_in_the_ledger_as_rejected(run, tmp_path):
    run(tmp_path / "labels.json")
    merged = json.loads((tmp_path / "labels.json").read_text())
    ids = [annotation["id"] for annotation in merged["annotations"]]
    assert sorted(ids) == sorted(set(range(40)) - {7, 20})
    ledger = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert sorted(row["position"] for row in ledger) == list(range(40))
    assert {row["id"]: row["reason"] for row in ledger if row["outcome"] == "rejected"} == {
        7: "empty_box: [1, 1, -4, 4]",
        20: "missing_image: x: y",
    }
