"""The figures of a training that goes on, as Ray metrics."""

from __future__ import annotations

from collections.abc import Mapping

METRICS = {
    "train_epoch": "epochs done, with the part of the present one",
    "train_boxes_per_second": "over the last minute, all workers together",
    "train_loss": "mean of the last steps, all workers together",
    "train_waiting_share": "part of the first worker's time in which it waits for images, in 0..1",
    "train_mean_iou": "mIoU of the last validation",
}
"""Name -> meaning. Prometheus knows them as ``ray_mal_<name>``, with the run's folder as the tag ``run``."""


def figures(boxes: float, boxes_per_epoch: int, per_second: float, loss: float, waiting: float) -> dict[str, float]:
    """By the names of METRICS: ``boxes`` trained on since the first epoch began."""
    return {
        "train_epoch": boxes / boxes_per_epoch,
        "train_boxes_per_second": per_second,
        "train_loss": loss,
        "train_waiting_share": waiting,
    }


def of_validation(kpi: Mapping[str, float]) -> dict[str, float]:
    """By the names of METRICS: what a validation found, if there was one."""
    return {"train_mean_iou": kpi["mIoU"]} if "mIoU" in kpi else {}
