"""Masks for a detector's boxes: COCO average precision of boxes and masks, by faster-coco-eval.

That package gives the figures of pycocotools, several times faster (a test compares them).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from mal import masks, storage
from mal.errors import InputError

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""The first six of COCO's summary: mean over IoU 0.5 to 0.95, at 0.5, at 0.75, and by area of the object."""


def average_precision(truth_path: str, shards: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """``{"bbox": FIGURES, "segm": FIGURES}`` of labelled detections; a figure over no object is None.

    Args:
        truth_path: COCO file with the true objects.
        shards: parquet files of rows.LABELS, whose boxes have scores. Rejected boxes do not count.

    Raises:
        InputError: the boxes have no scores, or the truth has no masks.
    """
    found = _results(shards)
    truth = json.loads(storage.read_bytes(truth_path))
    if not any(annotation.get("segmentation") for annotation in truth["annotations"]):
        raise InputError(f"dataset.val_ann_path = {truth_path!r}: has no masks to compare with")
    return {kind: _figures(truth, found, kind) for kind in ("bbox", "segm")}


def _results(shards: Sequence[str]) -> list[dict[str, Any]]:
    """The labelled boxes as a COCO result list."""
    results = []
    for path in shards:
        with storage.open_read(path) as file:
            columns = ["image_id", "category_id", "bbox", "score", "counts", "height", "width"]
            table = pq.read_table(file, columns=columns)
        for row in table.filter(pc.is_valid(table["counts"])).to_pylist():
            if row["score"] is None:
                raise InputError("evaluate.detections_path: its boxes have no scores, which average precision needs")
            mask = masks.rle(row.pop("counts"), row.pop("height"), row.pop("width"))
            results.append({**row, "segmentation": mask})
    return results


def _figures(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    from faster_coco_eval import COCO, COCOeval_faster

    if not results:
        return dict.fromkeys(FIGURES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(truth)
        # loadRes adds to what it is given, and would sort masks into the bands by the areas of boxes that it finds.
        other = "bbox" if kind == "segm" else "segmentation"
        given = [{k: v for k, v in result.items() if k != other} for result in results]
        evaluation = COCOeval_faster(objects, objects.loadRes(given), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(FIGURES, evaluation.stats, strict=False)}


def format_precision(precision: dict[str, dict[str, float | None]]) -> str:
    """The figures as aligned plain text, in per cent."""
    lines = [f"{'':<6}" + "".join(f"{name:>11}" for name in FIGURES)]
    for kind, figures in precision.items():
        values = ["-" if figures[name] is None else f"{100 * (figures[name] or 0):.2f}" for name in FIGURES]
        lines.append(f"{kind:<6}" + "".join(f"{value:>11}" for value in values))
    return "\n".join(lines)
