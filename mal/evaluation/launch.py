"""The door of evaluation: label the validation boxes, compare with their masks, print and write the figures."""

from __future__ import annotations

import json
import time
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from mal import boxes, storage
from mal.errors import InputError
from mal.labelling.run import LabelledRun, label_file
from mal.labelling.task import file_fingerprint
from mal.metrics import MaskScores, format_table
from mal.run.status import task_status
from mal.run.summary import write_summary
from mal.spec.checks import check_task
from mal.spec.derived import results_dir
from mal.spec.schema import Spec


def run_evaluation(spec: Spec) -> dict[str, Any]:
    """Measure ``evaluate.checkpoint`` on ``dataset.val_ann_path``.

    Every combination of checkpoint and options has its own rows under ``<folder>/runs``, so that a folder can be
    evaluated into again; ``metrics.json`` holds the figures of the last one.

    Returns:
        The figures, as in ``metrics.json``.

    Raises:
        SpecError: before anything is started.
        InputError: the validation file has no masks.
    """
    check_task(spec, "evaluate")
    folder, settings = results_dir(spec, "evaluate"), spec.evaluate
    storage.make_folder(folder)
    with task_status(folder, "evaluation") as status:
        begun = time.time()
        run = label_file(
            spec,
            settings,
            folder=storage.join(folder, "runs", _run_name(spec)),
            ann_path=spec.dataset.val_ann_path or "",
            images_path=None,
            img_dir=spec.dataset.val_img_dir or "",
            load_mask=True,
            status=status,
        )
        scores = score_shards(run)
        result = scores.result()
        if not result["counts"]["boxes"]:
            raise InputError(
                f"dataset.val_ann_path = {spec.dataset.val_ann_path!r}: none of its boxes has a mask to compare with"
            )
        names = run.index.summary.categories
        metrics = {
            **{name: value for name, value in result.items() if name != "per_class"},
            "per_class": {names.get(category, str(category)): score for category, score in result["per_class"].items()},
            "checkpoint": settings.checkpoint,
        }
        storage.write_bytes(storage.join(folder, "metrics.json"), json.dumps(metrics, indent=1).encode() + b"\n")
        facts = {"metrics": metrics, "rows": storage.parent(run.shards[0]), "labelling_seconds": run.seconds}
        write_summary(folder, "evaluate", spec, begun, facts)
        kpi = {name: value for name, value in result.items() if isinstance(value, float)}
        status.write("SUCCESS", f"mIoU {kpi['mIoU']:.4f} on {result['counts']['boxes']:,} boxes", kpi)
        print(format_table(result, names))
        print(f"metrics: {storage.join(folder, 'metrics.json')}", flush=True)
        return metrics


def _run_name(spec: Spec) -> str:
    """A folder name for the checkpoint and the options that change its masks."""
    pool = spec.evaluate
    options = {"teacher": pool.use_teacher_test, "mixed": pool.use_mixed_model_test, "flip": pool.use_flip_test}
    chosen = [name for name, on in options.items() if on] or ["student"]
    return "-".join([file_fingerprint(pool.checkpoint or ""), *chosen])


def score_shards(run: LabelledRun) -> MaskScores:
    """The scores of all rows that have an IoU."""
    scores = MaskScores()
    columns = ["category_id", "iou", "bbox", "width", "height"]
    for path in run.shards:
        with storage.open_read(path) as file:
            table = pq.read_table(file, columns=columns)
        for row in table.filter(pc.is_valid(table["iou"])).to_pylist():
            box = boxes.clip(boxes.from_xywh(row["bbox"]), row["width"], row["height"])
            assert box is not None, "only boxes that overlap their image are labelled"
            scores.add(row["category_id"], row["iou"], boxes.area(box))
    return scores
