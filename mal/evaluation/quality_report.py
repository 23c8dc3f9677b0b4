"""How well the quality of masks tells their IoU; and the calibration for it, fitted on the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mal import boxes, quality, storage

_COLUMNS = [
    *("image_id", "iou", "area", "bbox", "width", "height"),
    *("mean_probability", "stability", "tightness", "agreement", "overlap", "category_id"),
]

ESTIMATES = ("calibrated", "without_classes", "uncalibrated", "mean_probability")
"""What is compared: the calibration, one that does not know the boxes' classes, none, and the plainest estimate."""


def quality_report(shards: Sequence[str], categories: Mapping[int, str]) -> dict[str, Any]:
    """The content of ``quality.json``: what was measured, and the calibration that inference can use.

    The calibrated figures are those of boxes that the calibration had not seen: it is fitted five times, each time
    without a fifth of the images. ``without_classes`` is what to expect on classes that this file does not have. The
    calibration that is written is fitted on all.

    Args:
        shards: parquet files of rows.LABELS; boxes without an IoU do not count.
        categories: id -> name; an unknown id stands for itself.

    Returns:
        ``boxes`` counted, the `mal.quality.QualityReport` of each of `ESTIMATES`, and ``calibration``. With fewer than
        `mal.quality.FEWEST_BOXES` boxes, only ``boxes``.
    """
    table = read_scored(shards, _COLUMNS)
    report: dict[str, Any] = {"boxes": table.num_rows}
    if table.num_rows < quality.FEWEST_BOXES:
        return report
    evidence = np.array([_evidence(row) for row in table.to_pylist()])
    ious = table["iou"].to_numpy().astype(np.float64)
    classes = [categories.get(category, str(category)) for category in table["category_id"].to_pylist()]
    images = table["image_id"].to_numpy()
    estimates = {
        "calibrated": quality.cross_validated(evidence, ious, images, classes),
        "without_classes": quality.cross_validated(evidence, ious, images),
        "uncalibrated": quality.default_quality(evidence),
        "mean_probability": evidence[:, 0],
    }
    report |= {name: quality.judge(estimate, ious) for name, estimate in estimates.items()}
    return {**report, "calibration": quality.fit(evidence, ious, classes).to_json()}


def read_scored(shards: Sequence[str], columns: list[str]) -> pa.Table:
    """These columns of all rows that have an IoU."""
    tables = []
    for path in shards:
        with storage.open_read(path) as file:
            table = pq.read_table(file, columns=columns)
        tables.append(table.filter(pc.is_valid(table["iou"])))
    return pa.concat_tables(tables)


def _evidence(row: dict[str, Any]) -> quality.Evidence:
    box = boxes.clip(boxes.from_xywh(row["bbox"]), row["width"], row["height"])
    assert box is not None, "only boxes that overlap their image are labelled"
    return quality.evidence(
        box,
        row["area"],
        row["tightness"],
        **{name: row[name] for name in ("mean_probability", "stability", "overlap", "agreement")},
    )


def format_quality(report: dict[str, Any]) -> str:
    """The report as aligned plain text."""
    if "calibration" not in report:
        return f"quality of masks: {report['boxes']} boxes are too few to calibrate on ({quality.FEWEST_BOXES})"
    lines = [
        f"{'quality of masks':<18}{'rank corr.':>11}{'calib. error':>14}   mean IoU: all, without the worst 10/20/50 %"
    ]
    for name in ESTIMATES:
        found: quality.QualityReport = report[name]
        kept = "  ".join(f"{found['mean_iou_kept'][share]:.4f}" for share in ("10", "20", "50"))
        error = found["expected_calibration_error"]
        lines.append(
            f"{name.replace('_', ' '):<18}{found['spearman']:>11.3f}{error:>14.3f}   {found['mean_iou']:.4f}  {kept}"
        )
    return "\n".join(lines)
