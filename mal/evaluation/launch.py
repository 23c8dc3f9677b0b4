"""The door of evaluation: label the validation boxes, compare with their masks, print and write the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mal import storage
from mal.errors import InputError
from mal.evaluation.box_table import box_table, write_box_table
from mal.evaluation.detections import average_precision, format_precision
from mal.evaluation.quality_report import format_quality, quality_report
from mal.labelling.run import LabelledRun, label_file
from mal.labelling.task import file_fingerprint
from mal.metrics import MaskScores, Scores, format_table
from mal.run.status import task_status
from mal.run.summary import write_summary
from mal.spec.checks import check_task
from mal.spec.derived import results_dir
from mal.spec.schema import Spec


def run_evaluation(spec: Spec) -> dict[str, Any]:
    """Measure ``evaluate.checkpoint`` on ``dataset.val_ann_path``.

    Every combination of checkpoint and options has its own rows under ``<folder>/runs``, so that a folder can be
    evaluated into again; ``metrics.json`` holds the figures of the last one, and
    ``quality.json`` the calibration of its masks' quality.

    Returns:
        The figures, as in ``metrics.json``.

    Raises:
        SpecError: before anything is started.
        InputError: the validation file has no masks.
    """
    check_task(spec, "evaluate")
    folder, settings = results_dir(spec, "evaluate"), spec.evaluate
    storage.make_folder(folder)
    measure = _measure_masks if settings.detections_path is None else _measure_detections
    with task_status(folder, "evaluation") as status:
        begun = time.time()
        run = label_file(
            spec,
            settings,
            folder=storage.join(folder, "runs", _run_name(spec)),
            ann_path=settings.detections_path or spec.dataset.val_ann_path or "",
            images_path=None if settings.detections_path is None else spec.dataset.val_ann_path,
            img_dir=spec.dataset.val_img_dir or "",
            load_mask=settings.detections_path is None,
            status=status,
        )
        found = measure(spec, run, folder)
        run.stages.done("measure")
        metrics = {**found.metrics, "checkpoint": settings.checkpoint}
        storage.write_bytes(storage.join(folder, "metrics.json"), json.dumps(metrics, indent=1).encode() + b"\n")
        shards = storage.parent(run.shards[0]) if run.shards else None
        write_summary(
            folder,
            "evaluate",
            spec,
            begun,
            run.stages,
            run.hardware,
            {"metrics": metrics, "rows": shards, "boxes": run.boxes, "actors": run.actors},
        )
        status.write("SUCCESS", found.line, found.kpi)
        print(found.table)
        print(f"metrics:  {storage.join(folder, 'metrics.json')}")
        print(f"each box: {', '.join(found.files) or shards}", flush=True)
        return metrics


class _Measured(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, Any]
    line: str
    kpi: dict[str, float]
    table: str
    files: tuple[str, ...] = ()
    """Tables of every box."""


def _measure_masks(spec: Spec, run: LabelledRun, folder: str) -> _Measured:
    """IoU of masks and boundaries, the table of every box, and the quality report with its calibration."""
    names = run.index.summary.categories
    table = box_table(run.shards, names)
    result, boundary = scores(table, "iou").result(), scores(table, "boundary_iou").result()
    if not result["counts"]["boxes"]:
        raise InputError(
            f"dataset.val_ann_path = {spec.dataset.val_ann_path!r}: none of its boxes has a mask to compare with"
        )
    report = quality_report(run.shards, names)
    path = storage.join(folder, "quality.json")
    storage.write_bytes(path, json.dumps(report, indent=1).encode() + b"\n")
    files = write_box_table(table, folder, spec.evaluate.per_box)
    metrics = {
        **_named(result, names),
        "boundary": _named(boundary, names),
        "quality": {name: value for name, value in report.items() if name != "calibration"},
    }
    kpi = {name: value for name, value in result.items() if isinstance(value, float)}
    kpi |= {f"boundary_{name}": value for name, value in boundary.items() if isinstance(value, float)}
    line = f"mIoU {kpi['mIoU']:.4f}, of boundaries {kpi['boundary_mIoU']:.4f}, on {result['counts']['boxes']:,} boxes"
    hint = f"\nto calibrate inference with it: inference.quality_path={path}" if "calibration" in report else ""
    shown = format_table({"IoU %": result, "boundary %": boundary}, names)
    return _Measured(metrics, line, kpi, f"{shown}\n\n{format_quality(report)}{hint}", tuple(files))


def _named(result: Scores, names: Mapping[int, str]) -> dict[str, Any]:
    """Scores as JSON, classes by name."""
    per_class = {names.get(category, str(category)): score for category, score in result["per_class"].items()}
    return {**result, "per_class": per_class}


def _measure_detections(spec: Spec, run: LabelledRun, folder: str) -> _Measured:
    """COCO average precision of a detector's boxes and of their masks."""
    precision = average_precision(spec.dataset.val_ann_path or "", run.shards)
    kpi = {f"{kind}_AP": figures["AP"] or 0.0 for kind, figures in precision.items()}
    line = f"AP {kpi['bbox_AP']:.4f} of boxes, {kpi['segm_AP']:.4f} of masks"
    return _Measured({"average_precision": precision}, line, kpi, format_precision(precision))


def _run_name(spec: Spec) -> str:
    """A folder name for the checkpoint and the options that change its masks."""
    pool = spec.evaluate
    options = {
        "teacher": pool.use_teacher_test,
        "mixed": pool.use_mixed_model_test,
        "flip": pool.use_flip_test,
        "crf": pool.use_crf_test,
        "margins" + "_".join(f"{margin:g}" for margin in pool.test_margins or ()): pool.test_margins is not None,
        "filled": pool.fill_holes,
        "largest": pool.largest_component,
        f"from{pool.min_component_area}px": pool.min_component_area > 0,
    }
    chosen = [name for name, on in options.items() if on] or ["student"]
    files = [file_fingerprint(path) for path in (pool.quality_path, pool.detections_path) if path is not None]
    return "-".join([file_fingerprint(pool.checkpoint or ""), *chosen, *files])


def scores(table: pa.Table, column: str) -> MaskScores:
    """The scores of all boxes of a `box_table` that have an IoU; ``column``: which IoU."""
    found = MaskScores()
    measured = table.filter(pc.is_valid(table[column]))
    found.add_all(*(measured[name].to_pylist() for name in ("category_id", column, "box_area")))
    return found
