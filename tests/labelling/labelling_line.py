"""A small labelling run, and what must hold after it whatever happened on the way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mal import rows
from mal.data.index_folder import open_index
from mal.data.scenes import write_scenes
from mal.model.network import build_network
from mal.spec.load import load_spec
from mal.spec.schema import Spec

SETTINGS = [
    "dataset.crop_size=32",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "train.mask_thres=[0.5]",
    "inference.precision=fp32",
    "inference.shard_boxes=6",
    "inference.batch_size=4",
    "inference.cpus_per_actor=0.5",
    "inference.max_actors=2",
]


ALWAYS_REJECTED = {"outside": 1, "bad_bbox": 1, "empty_box": 1}
"""Annotations of the input that no run labels."""


@dataclass(frozen=True)
class Line:
    """Boxes, images and a checkpoint to label them with."""

    annotations: Path
    images: Path
    checkpoint: Path

    def arguments(self, folder: Path | str, *more: str) -> list[str]:
        """Overrides of a spec that labels the boxes into ``folder``."""
        return [
            f"results_dir={folder}",
            f"inference.results_dir={folder}",
            f"inference.ann_path={self.annotations}",
            f"inference.img_dir={self.images}",
            f"inference.checkpoint={self.checkpoint}",
            *SETTINGS,
            *more,
        ]

    def spec(self, folder: Path | str, *more: str) -> Spec:
        return load_spec(None, self.arguments(folder, *more))

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.annotations.read_text())

    def file_name(self, image_id: int) -> str:
        return next(image["file_name"] for image in self.document["images"] if image["id"] == image_id)


@pytest.fixture(scope="session")
def line(tmp_path_factory) -> Line:
    """24 scenes with a few annotations that cannot be labelled, and a small network with random weights."""
    folder = tmp_path_factory.mktemp("line")
    paths = write_scenes(str(folder), images=24, seed=11, size=(96, 80))
    annotations = Path(paths.annotations)
    document = json.loads(annotations.read_text())
    odd = [{"bbox": [-5, -5, 30, 30]}, {"bbox": [500, 500, 3, 3]}, {"bbox": [1, 2, 3]}, {"bbox": [1, 1, 9, 0]}]
    document["annotations"] += [{"id": 9000 + k, "image_id": 1, "category_id": 1, **o} for k, o in enumerate(odd)]
    annotations.write_text(json.dumps(document))
    torch.manual_seed(3)
    network = build_network(load_spec(None, SETTINGS).model, crop_size=32)
    torch.save(network.state_dict(), folder / "network.pth")
    return Line(annotations, Path(paths.images), folder / "network.pth")


@pytest.fixture(scope="session")
def undisturbed(line: Line, tmp_path_factory, ray_here) -> list[dict[str, Any]]:
    """The rows of a run that nothing happens to."""
    from mal.inference.launch import run_inference

    folder = tmp_path_factory.mktemp("undisturbed")
    run_inference(line.spec(folder))
    assert check_account(folder, line.document) == ALWAYS_REJECTED
    found = label_table(folder).to_pylist()
    assert len(found) > 40
    assert sum(row["area"] > 0 for row in found) > 30, "masks that are all empty would show nothing"
    return found


def label_table(folder: Path) -> pa.Table:
    """All rows of a run, by position."""
    shards = sorted((folder / "shards").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(shard) for shard in shards]).sort_by("position")


def check_account(folder: Path, document: dict[str, Any]) -> Counter[str]:
    """Every annotation of ``document`` has one outcome, every label one row, and nothing lies about.

    Returns:
        The rejected annotations by reason code.
    """
    index = open_index(str(folder / "index"))
    assert len(list((folder / "shards").glob("part-*.parquet"))) == index.shards
    table, total = label_table(folder), len(document["annotations"])
    assert table.schema == rows.LABELS
    assert len(set(table["id"].to_pylist())) == table.num_rows == index.summary.boxes
    ledger = pq.read_table(folder / "ledger.parquet")
    assert sorted(ledger["position"].to_pylist()) == list(range(total))
    outcomes = Counter(ledger["outcome"].to_pylist())
    reasons = Counter(reason.partition(":")[0] for reason in ledger["reason"].to_pylist() if reason is not None)
    assert reasons.total() == outcomes["rejected"]
    merged = json.loads((folder / "labels.json").read_text())
    expected = {annotation["id"] for annotation in document["annotations"]}
    rejected = set(ledger.filter(pa.compute.equal(ledger["outcome"], "rejected"))["id"].to_pylist())
    ids = [annotation["id"] for annotation in merged["annotations"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == expected - rejected
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["annotations"] == total
    assert sum(summary["rejected"].values()) + summary["labelled"] + summary["clipped"] + summary["crowd"] == total
    assert not list(folder.rglob("*.part")), "half-written files"
    assert not list((folder / "shards" / "attempts").glob("*")), "accounts of attempts at shards that are done"
    return reasons
