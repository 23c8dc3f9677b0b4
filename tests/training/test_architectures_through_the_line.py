"""All thirteen architectures take the whole line without Ray: a step, a checkpoint, resuming, labels, their IoU."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_training import make_batch, save_now, tiny_model

from mal import architectures, masks, metrics, rows
from mal.architectures import ARCHITECTURES
from mal.labelling.actor import load_predictor
from mal.labelling.shard import label_rows
from mal.labelling.task import file_fingerprint, make_task
from mal.training.checkpoints import TrainingState, resume
from mal.training.step import Moment, Stepper

BLOCKS = 2
"""Of every backbone: one of 32 blocks would need gigabytes. Widths, heads and strides are the real ones."""


@pytest.fixture(params=ARCHITECTURES)
def name(request, monkeypatch):
    """The name of an architecture, which is cut to two blocks."""
    cut = dataclasses.replace(ARCHITECTURES[request.param], depth=BLOCKS)
    monkeypatch.setitem(architectures.ARCHITECTURES, request.param, cut)
    return request.param


def _index(folder) -> pa.Table:
    """One image with a box of each band and their masks."""
    pixels = np.random.default_rng(0).integers(0, 255, (160, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    boxes = [
        {"position": k, "id": k, "category_id": 1, "bbox": bbox, "score": None, "clipped": False, "carried": None}
        | {"segmentation": json.dumps([[x, y, x + w, y, x + w, y + h]])}
        for k, bbox in enumerate([[5, 5, 20, 10], [30, 30, 60, 60], [0, 0, 190, 150]])
        for x, y, w, h in [bbox]
    ]
    image = {"image_id": 1, "file_name": "a.png", "width": 200, "height": 160, "boxes": boxes}
    return pa.Table.from_pylist([image], schema=rows.INDEX)


def test_through_the_line(name, train_task, tmp_path):
    side = {16: 32, 14: 42}[ARCHITECTURES[name].stride]
    task = train_task(f"model.arch={name}", f"dataset.crop_size={side}", "evaluate.use_mixed_model_test=true")
    batch = make_batch(0, 2)
    for key in ("image", "teacher_image", "box_mask"):
        maps = batch[key] if batch[key].ndim == 4 else batch[key][:, None]
        batch[key] = F.interpolate(maps, size=side).reshape(*batch[key].shape[:-2], side, side)

    stepper = Stepper(task.spec, tiny_model(task.spec), torch.device("cpu"), 1)
    before = [parameter.detach().clone() for parameter in stepper.model.student.backbone.parameters()]
    losses = stepper.step([batch], Moment(0, 0, 10))
    assert all(math.isfinite(value) for value in losses.tolist())
    moved = [not torch.equal(a, b) for a, b in zip(before, stepper.model.student.backbone.parameters(), strict=True)]
    assert np.mean(moved) > 0.75  # not those that a map without class token does not depend on
    state = TrainingState(epoch=1, global_step=1)
    save_now(task, stepper, state)
    path = task.epoch_path(0)

    again = Stepper(task.spec, tiny_model(task.spec), torch.device("cpu"), 1)
    assert resume(task, again.strategy, again.optimizer, again.scaler).epoch == 1
    assert again.step([batch], Moment(1, 0, 10)).tolist() == stepper.step([batch], Moment(1, 0, 10)).tolist()

    pool = task.spec.evaluate
    paths = {"folder": str(tmp_path), "img_dir": str(tmp_path), "checkpoint": path}
    label = make_task(task.spec, pool, **paths, model_id=file_fingerprint(path), load_mask=True, gpu=False)
    with ThreadPoolExecutor(1) as threads:
        labels = label_rows(label, load_predictor(label), threads, _index(tmp_path)).to_pylist()
    scores = metrics.MaskScores()
    for row in labels:
        assert row["reason"] is None
        assert masks.area(row["counts"], 160, 200) == row["area"]
        assert 0.0 <= row["agreement"] <= 1.0
        scores.add(row["category_id"], row["iou"], row["bbox"][2] * row["bbox"][3])
    assert scores.result()["counts"] == {"boxes": 3, "small": 1, "medium": 1, "large": 1}
