"""Validation during training: every worker takes its part of the images, the scores are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from mal import boxes, masks, pictures, storage
from mal.data import images
from mal.data.index import open_index
from mal.labelling.shard import label_rows
from mal.labelling.task import LabelTask, make_task
from mal.metrics import MaskScores
from mal.model.precision import compute_name
from mal.predictor import Predictor
from mal.training.events import EventLog
from mal.training.step import Stepper
from mal.training.task import TrainTask

SAMPLE_IMAGES = 8
"""Images whose masks are shown in TensorBoard."""


def validate(task: TrainTask, stepper: Stepper, rank: int, events: EventLog | None, step: int) -> dict[str, float]:
    """mIoU of the student on the validation boxes that have masks; a call of all ranks together, the same for all.

    Returns:
        ``mIoU``, ``mIoU_small``, ``mIoU_medium``, ``mIoU_large`` and ``box_mean_iou``, those that exist.
    """
    assert task.val_index is not None
    labelling = _labelling_task(task)
    predictor = Predictor(
        stepper.model.student,
        crop_size=labelling.crop_size,
        mask_threshold=labelling.mask_thres,
        margin_rate=labelling.margin_rate,
        device=stepper.device,
        precision=compute_name("auto" if task.spec.train.use_amp else "fp32", stepper.device),
    )
    scores = MaskScores()
    samples: list[tuple[dict[str, Any], pa.Table]] = []
    # After the predictor, which moves the network to the device it is on: that would undo it.
    with stepper.strategy.gathered(), ThreadPoolExecutor(labelling.decode_threads) as pool:
        for work in _own_images(task, rank, stepper.workers):
            labels = label_rows(labelling, predictor, pool, work)
            measured = labels.filter(pa.compute.is_valid(labels["iou"]))
            areas = [_clipped_area(row) for row in measured.to_pylist()]
            scores.add_all(measured["category_id"].to_pylist(), measured["iou"].to_pylist(), areas)
            if len(samples) < SAMPLE_IMAGES:
                samples += _sample(work, labels)
    stepper.model.train()
    joined = _joined(scores, stepper.workers)
    found = {name: value for name, value in joined.result().items() if isinstance(value, float)}
    if events is not None:
        events.scores(step, found)
        for place, (record, labels) in enumerate(samples):
            events.picture(step, f"masks/{place}", _picture(labelling, record, labels))
        events.flush()
    return found


def _labelling_task(task: TrainTask) -> LabelTask:
    """Validation as a labelling task that reads no checkpoint and writes no shard."""
    assert task.val_index is not None
    made = make_task(
        task.spec,
        dataclasses.replace(task.spec.evaluate, quality_path=None),  # evaluation writes it, and may not have run yet
        folder=storage.parent(task.val_index),
        img_dir=task.spec.dataset.val_img_dir or "",
        checkpoint="",
        model_id="",
        load_mask=True,
        gpu=task.use_gpu,
    )
    return made


def _own_images(task: TrainTask, rank: int, workers: int) -> Iterator[pa.Table]:
    """This rank's rows of the validation index, some at a time: every ``workers``-th row."""
    assert task.val_index is not None
    index = open_index(task.val_index)
    first = 0
    for shard in range(index.shards):
        rows = index.read_shard(shard)
        mine = np.arange((rank - first) % workers, rows.num_rows, workers)
        first += rows.num_rows
        if len(mine):
            yield rows.take(pa.array(mine))


def _joined(scores: MaskScores, workers: int) -> MaskScores:
    """The scores of all ranks."""
    if workers == 1:
        return scores
    parts: list[Any] = [None] * workers
    dist.all_gather_object(parts, scores)
    total = MaskScores()
    for part in parts:
        total.merge(part)
    return total


def _clipped_area(row: dict[str, Any]) -> float:
    box = boxes.clip(boxes.from_xywh(row["bbox"]), row["width"], row["height"])
    assert box is not None, "only boxes that overlap their image are labelled"
    return boxes.area(box)


def _sample(work: pa.Table, labels: pa.Table) -> list[tuple[dict[str, Any], pa.Table]]:
    """The first image of ``work`` with a mask, and the labels; none if there is no such image."""
    shown = labels.filter(pa.compute.is_valid(labels["counts"]))["image_id"]
    rows = work.filter(pa.compute.is_in(work["image_id"], shown))
    return [(record, labels) for record in rows.slice(0, 1).to_pylist()]


def _picture(task: LabelTask, record: dict[str, Any], labels: pa.Table) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image with the masks of its boxes, [H, W, 3]."""
    image = images.decode(images.safe_join(task.img_dir, record["file_name"]), max_pixels=task.max_image_pixels)
    drawn = [r for r in labels.to_pylist() if r["image_id"] == record["image_id"] and r["counts"] is not None]
    rles = [masks.rle(r["counts"], r["height"], r["width"]) for r in drawn]
    return pictures.overlay(image, rles, [r["bbox"] for r in drawn])
