"""One file with everything that can be wrong with boxes and images, through index, labelling and merge."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from mal import masks, storage
from mal.data.index import build_index
from mal.errors import InputError
from mal.inference.merge import merge
from mal.labelling.actor import ShardLabeler
from mal.labelling.task import make_task
from mal.predictor import Predictor
from mal.spec.load import load_spec

WIDTH, HEIGHT = 40, 30
GOOD_BOX = [5, 5, 20, 15]


class _Everywhere(nn.Module):
    """Says mask everywhere."""

    def forward(self, images: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 8, 8), 9.0)


class _Labeler(ShardLabeler):
    def load(self) -> Predictor:
        return Predictor(_Everywhere(), crop_size=32)


def _label(text: bytes, folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The ledger by position and the merged file of an input, labelled here without Ray."""
    (folder / "in.json").write_bytes(text)
    results = folder / "results"
    spec = load_spec(None, ["dataset.crop_size=32", "dataset.max_image_pixels=1000000"])
    index = build_index(str(folder / "in.json"), str(results / "index"), shard_boxes=7, max_image_pixels=1_000_000)
    task = make_task(
        spec,
        spec.inference,
        folder=str(results),
        img_dir=str(folder / "images"),
        checkpoint="",
        model_id="m",
        load_mask=False,
        gpu=False,
    )
    labeler = _Labeler(task)
    reports = [labeler.label(shard) for shard in range(index.shards)]
    paths = [task.shard_path(shard) for shard in range(index.shards)]
    counts = merge(index, paths, str(results / "labels.json"), str(results / "ledger.parquet"))
    ledger = {row["position"]: row for row in pq.read_table(results / "ledger.parquet").to_pylist()}
    assert counts.total == len(ledger) == index.summary.annotations
    assert sum(boxes for boxes, _ in reports) == index.summary.boxes
    assert not storage.exists(f"{task.shards_folder}/attempts/part-000000.json")
    return ledger, json.loads((results / "labels.json").read_bytes())


def _outcome(row: dict[str, Any]) -> str:
    return row["outcome"] if row["reason"] is None else row["reason"].partition(":")[0]


def _noise(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    return _encoded(_noise(HEIGHT, WIDTH), "JPEG", exif=exif)


IMAGES: dict[str, tuple[bytes | None, str]] = {
    "plain.jpg": (_encoded(_noise(), "JPEG"), "labelled"),
    "wrong extension.png": (_encoded(_noise(), "JPEG"), "labelled"),
    "no extension": (_encoded(_noise(), "WEBP"), "labelled"),
    "cmyk.jpg": (_encoded(_noise().convert("CMYK"), "JPEG"), "labelled"),
    "16bit.png": (_encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16)), "PNG"), "labelled"),
    "palette.gif": (_encoded(_noise().quantize(16), "GIF"), "labelled"),
    "grey.png": (_encoded(_noise().convert("L"), "PNG"), "labelled"),
    "alpha.png": (_encoded(_noise().convert("RGBA"), "PNG"), "labelled"),
    "animated.gif": (_encoded(_noise(), "GIF", save_all=True, append_images=[_noise().rotate(180)]), "labelled"),
    "rotated.jpg": (_rotated(), "labelled"),
    "sub/folder/deep.jpg": (_encoded(_noise(), "JPEG"), "labelled"),
    "sub/../plain.jpg": (None, "labelled"),
    "ünïcode 图片.jpg": (_encoded(_noise(), "JPEG"), "labelled"),
    "50%20of%2F.jpg": (_encoded(_noise(), "JPEG"), "labelled"),
    "other size.jpg": (_encoded(_noise(WIDTH + 1, HEIGHT), "JPEG"), "size_differs"),
    "truncated.jpg": (_encoded(_noise(), "JPEG")[:300], "unreadable_image"),
    "empty.jpg": (b"", "unreadable_image"),
    "text.jpg": (b"<html>not found</html>", "unreadable_image"),
    "bomb.png": (_encoded(Image.new("1", (20_000, 20_000)), "PNG"), "too_large"),
    "missing.jpg": (None, "missing_image"),
    "sub/folder": (None, "unreadable_image"),
    "../in.json": (None, "unsafe_path"),
    "sub/../../in.json": (None, "unsafe_path"),
    "/etc/hostname": (None, "unsafe_path"),
    "file:///etc/hostname": (None, "unsafe_path"),
    "link out.jpg": (None, "unsafe_path"),
}
"""File name -> its content (None: no such file, or made by the test), and what becomes of a good box on it."""


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    for name, (content, _) in IMAGES.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (tmp_path / "outside.jpg").write_bytes(IMAGES["plain.jpg"][0] or b"")
    (folder / "link out.jpg").symlink_to(tmp_path / "outside.jpg")
    return folder


def test_images_of_every_kind_have_their_stated_outcome(tmp_path, images):
    records = [{"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT} for k, name in enumerate(IMAGES, start=1)]
    boxes = [
        {"id": 100 + r["id"] * 2 + k, "image_id": r["id"], "category_id": 1, "bbox": bbox}
        for r in records
        for k, bbox in enumerate([GOOD_BOX, [-3, 2, 10, 10]])
    ]
    document = {"images": records, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    ledger, merged = _label(json.dumps(document).encode(), tmp_path)
    names = {record["id"]: record["file_name"] for record in records}
    found = {(names[row["image_id"]], position % 2): _outcome(row) for position, row in ledger.items()}
    for name, (_, expected) in IMAGES.items():
        assert found[name, 0] == expected, name
        assert found[name, 1] == ("clipped" if expected == "labelled" else expected), name
    labelled = sum(expected == "labelled" for _, expected in IMAGES.values())
    assert len(merged["annotations"]) == 2 * labelled
    for annotation in merged["annotations"]:
        assert masks.area(annotation["segmentation"]["counts"], HEIGHT, WIDTH) == annotation["area"] > 0


def test_very_small_and_very_wide_images(tmp_path, images):
    sizes = {"dot.png": (1, 1), "wide.png": (20_000, 3)}
    for name, size in sizes.items():
        _noise(*size).save(images / name)
    records = [
        {"id": k, "file_name": name, "width": w, "height": h} for k, (name, (w, h)) in enumerate(sizes.items(), 1)
    ]
    boxes = [[0, 0, 1, 1], [0.2, 0.2, 0.5, 0.5]], [[0, 0, 20_000, 3], [10_000, 1, 9000, 1], [19_999, 2, 5, 5]]
    annotations = [
        {"id": image_id * 10 + k, "image_id": image_id, "category_id": 1, "bbox": bbox}
        for image_id, own in enumerate(boxes, 1)
        for k, bbox in enumerate(own)
    ]
    document = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    ledger, merged = _label(json.dumps(document).encode(), tmp_path)
    assert [_outcome(ledger[position]) for position in range(5)] == ["labelled"] * 4 + ["clipped"]
    assert {a["id"]: a["area"] for a in merged["annotations"] if a["area"] > 0}.keys() >= {10, 20, 21}


ANNOTATIONS: list[tuple[str, str]] = [
    ('{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}', "labelled"),
    ('{"id": 2, "image_id": 1, "category_id": 1, "bbox": [NaN, 5, 20, 15]}', "not_finite"),
    ('{"id": 3, "image_id": 1, "category_id": 1, "bbox": [5, Infinity, 20, 15]}', "not_finite"),
    ('{"id": 4, "image_id": 1, "category_id": 1, "bbox": [5, 5, 1e999, 15]}', "not_finite"),
    ('{"id": 5, "image_id": 1, "category_id": 1, "bbox": [5, 5, -20, 15]}', "empty_box"),
    ('{"id": 6, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 15]}', "empty_box"),
    ('{"id": 7, "image_id": 1, "category_id": 1, "bbox": [5000, 5, 20, 15]}', "outside"),
    ('{"id": 8, "image_id": 1, "category_id": 1, "bbox": [-1e7, -1e7, 3e7, 3e7]}', "clipped"),
    ('{"id": 9, "image_id": 1, "category_id": 1, "bbox": ["5", "5", "20", "15"]}', "bad_bbox"),
    ('{"id": 10, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20]}', "bad_bbox"),
    ('{"id": 11, "image_id": 1, "category_id": 1}', "bad_bbox"),
    ('{"id": "12", "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}', "bad_id"),
    ('{"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}', "bad_id"),
    ('{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}', "duplicate_id"),
    ('{"id": 9007199254740993, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}', "labelled"),
    ('{"id": 16, "image_id": 1, "category_id": 77, "bbox": [5, 5, 20, 15]}', "labelled"),
    ('{"id": 17, "image_id": 1, "category_id": "cat", "bbox": [5, 5, 20, 15]}', "bad_category"),
    ('{"id": 18, "image_id": 404, "category_id": 1, "bbox": [5, 5, 20, 15]}', "unknown_image"),
    ('{"id": 19, "image_id": "1", "category_id": 1, "bbox": [5, 5, 20, 15]}', "bad_image_id"),
    ('{"id": 20, "image_id": 3, "category_id": 1, "bbox": [5, 5, 20, 15]}', "bad_image_record"),
    ('["not", "an", "object"]', "not_an_object"),
    (
        '{"id": 22, "image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1, '
        '"segmentation": {"size": [30, 40], "counts": [0, 1200]}}',
        "crowd",
    ),
]
"""The text of an annotation, and what becomes of it."""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_annotations_of_every_kind_have_their_stated_outcome(tmp_path, images, mark):
    records = [
        {"id": 1, "file_name": "plain.jpg", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "image without boxes.jpg", "width": WIDTH, "height": HEIGHT},
        {"id": 3, "file_name": "plain.jpg", "width": "wide", "height": HEIGHT},
    ]
    head = json.dumps({"images": records, "categories": [{"id": 1, "name": "x"}]})
    text = head[:-1] + ', "annotations": [' + ", ".join(text for text, _ in ANNOTATIONS) + "]}"
    ledger, merged = _label(mark + text.encode(), tmp_path)
    assert [_outcome(ledger[k]) for k in range(len(ANNOTATIONS))] == [expected for _, expected in ANNOTATIONS]
    ids = [annotation["id"] for annotation in merged["annotations"]]
    assert Counter(ids) == Counter([1, 8, 9007199254740993, 16, 22])
    assert merged["annotations"][-1] == json.loads(ANNOTATIONS[-1][0])
    assert merged["images"] == records


def test_no_annotations_at_all(tmp_path, images):
    record = {"id": 1, "file_name": "plain.jpg", "width": WIDTH, "height": HEIGHT}
    ledger, merged = _label(json.dumps({"images": [record], "annotations": []}).encode(), tmp_path)
    assert ledger == {}
    assert merged == {"images": [record], "annotations": []}


@pytest.mark.parametrize("text", [b'{"images": [], "annotations": [{"id": 1', b"3", b'"text"', b"", b"[[["])
def test_files_that_are_no_coco_files_are_one_error(tmp_path, images, text):
    with pytest.raises(InputError, match=r"in\.json"):
        _label(text, tmp_path)
    assert not (tmp_path / "results" / "labels.json").exists()
