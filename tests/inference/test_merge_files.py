"""The files that a merge writes: compressed ones, many shards, and nothing in memory that grows."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal import masks, rows
from mal.boxes import Window
from mal.data.index import build_index
from mal.errors import StorageError
from mal.inference import merge as merge_module
from mal.inference.annotations import OutputOptions, annotation_texts
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
    return lambda path, **options: merge(
        index, paths, str(path), str(tmp_path / "ledger.parquet"), OutputOptions(**options)
    )


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


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_files_per_shard_hold_together_what_the_one_file_holds(run, tmp_path, ending):
    run(tmp_path / "whole.json")
    run(tmp_path / f"parts{ending}", per_shard=True)
    whole = json.loads((tmp_path / "whole.json").read_text())
    files = sorted((tmp_path / "parts").iterdir())
    read = {f.name.removesuffix(ending): f.read_bytes() for f in files}
    parts = {name: json.loads(gzip.decompress(b) if ending.endswith("gz") else b) for name, b in read.items()}
    rest = parts.pop("rest")
    assert list(parts) == [f"part-{k:06d}" for k in range(len(parts))]
    assert len(parts) > 5
    assert [a for part in parts.values() for a in part["annotations"]] + rest["annotations"] == whole["annotations"]
    assert [a["id"] for a in rest["annotations"]] == [8]
    assert {k: v for k, v in rest.items() if k != "annotations"} == {
        k: v for k, v in whole.items() if k != "annotations"
    }
    images = {image["id"]: image for image in whole["images"]}
    for part in parts.values():
        assert {a["image_id"] for a in part["annotations"]} <= {image["id"] for image in part["images"]}
        assert all(images[image["id"]] == image for image in part["images"])
        assert part["categories"] == whole["categories"]


def test_a_disk_that_fills_up_while_merging_leaves_the_old_file_and_the_next_merge_works(run, tmp_path):
    labels = tmp_path / "labels.json"
    labels.write_text("the old one")
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(StorageError, match=rf"(labels\.json|ledger\.parquet).*{os.strerror(errno.EFBIG)}"):
            run(labels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert labels.read_text() == "the old one"
    assert sorted(tmp_path.iterdir()) == before
    run(labels)
    assert len(json.loads(labels.read_text())["annotations"]) == 38


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_the_file_is_json_wherever_the_blocks_end_that_the_rest_of_the_input_is_copied_in(
    run, tmp_path, monkeypatch, ending
):
    run(tmp_path / "whole.json")
    expected = (tmp_path / "whole.json").read_bytes()
    size = (tmp_path / "index" / "rest.json").stat().st_size
    for block in [1, 2, 7, size // 2, *range(size - 3, size + 2)]:
        monkeypatch.setattr(merge_module, "COPIED_BYTES", block)
        path = tmp_path / f"labels{ending}"
        run(path)
        text = path.read_bytes() if ending == ".json" else gzip.decompress(path.read_bytes())
        assert text == expected, f"blocks of {block} bytes"


@given(members=st.integers(0, 3), space=st.text(" \t\r\n", max_size=5), block=st.integers(1, 40))
def test_an_object_stays_open_whatever_follows_its_end(tmp_path_factory, members, space, block):
    path = tmp_path_factory.mktemp("rest") / "rest.json"
    document = {f"m{k}": k for k in range(members)}
    path.write_bytes(json.dumps(document).encode() + space.encode())
    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "COPIED_BYTES", block)
        merge_module.open_annotations(str(path), out)
    assert json.loads(out.getvalue() + b"]}") == {**document, "annotations": []}


CARRIED = [
    None,
    "{}",
    '{ "note": "x, \\"y\\" }", "deep": {"iou": [1, {"a": null}]}}',
    '{"score": "high", "a": 1}',
    '{"quality": 0.5, "low_quality": true}',
    '{"\\u0073core": "spelled", "b": "\\u00e9"}',
    '{"ünïcode 图": "图片"}',
    '{"half": "\\ud800", "\\udfff": 0.1, "score": "high"}',
]


def test_the_text_of_annotations_is_that_of_their_fields():
    moments = random.Random(3)
    made = []
    for k in range(300):
        known = moments.random() < 0.5
        made.append(
            {
                "position": k,
                "id": moments.randrange(-(2**62), 2**62),
                "image_id": k,
                "category_id": moments.randrange(99),
                "bbox": [moments.choice([1e22, 0.1, -5.0, 1e-9, moments.uniform(0, 999)]) for _ in range(4)],
                "score": moments.random() if known else None,
                "iou": moments.random() if moments.random() < 0.3 else None,
                "clipped": known,
                "carried": moments.choice(CARRIED),
                "file_name": "x",
                "height": 480,
                "width": 640,
                "counts": "".join(chr(moments.randrange(48, 112)) for _ in range(30)),
                "area": k,
                "quality": moments.random(),
                "reason": "low_quality: 0.1" if k % 5 == 0 else None,
                "model": "m",
            }
        )
    table = pa.Table.from_pylist(made, schema=rows.LABELS)
    for dump in (False, True):
        texts = annotation_texts(table.slice(7), OutputOptions(dump_quality=dump)).to_pylist()
        for text, row in zip(texts, table.slice(7).to_pylist(), strict=True):
            expected = json.loads(row["carried"] or "{}")
            if dump:
                expected.pop("quality", None)
            expected |= {name: row[name] for name in ("id", "image_id", "category_id", "bbox", "area")}
            expected |= {"iscrowd": 0, "segmentation": {"size": [480, 640], "counts": row["counts"]}}
            for name in ("score", "iou", "quality") if dump else ("score", "iou"):
                if row[name] is not None:
                    expected[name] = row[name]
            if row["reason"]:
                expected["low_quality"] = True
            assert json.loads(text) == expected
