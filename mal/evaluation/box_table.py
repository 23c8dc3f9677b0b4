"""The table of every box of an evaluation, worst first: its IoU, its quality, and what that is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mal import boxes, storage

BOXES = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),  # of the annotation
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("band", pa.string(), nullable=False),  # by box_area
        pa.field("x", pa.float64(), nullable=False),  # the box as it was given
        pa.field("y", pa.float64(), nullable=False),
        pa.field("w", pa.float64(), nullable=False),
        pa.field("h", pa.float64(), nullable=False),
        pa.field("box_area", pa.float64(), nullable=False),  # of the part in the image, px^2
        pa.field("mask_area", pa.int64()),
        pa.field("iou", pa.float64()),
        pa.field("boundary_iou", pa.float64()),
        pa.field("quality", pa.float32()),
        pa.field("score", pa.float64()),  # of the input, if it had one
        pa.field("mean_probability", pa.float32()),
        pa.field("stability", pa.float32()),
        pa.field("tightness", pa.float32()),
        pa.field("agreement", pa.float32()),
        pa.field("reason", pa.string()),  # why there is no mask
    ]
)
"""One row per box of the file, rejected ones included; sorted by IoU, those without one at the end."""

_SAME = [name for name in BOXES.names if name not in ("category", "band", "x", "y", "w", "h", "box_area", "mask_area")]


def box_table(shards: Sequence[str], categories: Mapping[int, str]) -> pa.Table:
    """The table `BOXES` of finished shards.

    Args:
        shards: parquet files of rows.LABELS.
        categories: id -> name; an unknown id stands for itself.
    """
    columns = [*_SAME, "bbox", "width", "height", "area"]
    parts = []
    for path in shards:
        with storage.open_read(path) as file:
            parts.append(_rows(pq.read_table(file, columns=columns), categories))
    return pa.concat_tables(parts or [BOXES.empty_table()]).sort_by([("iou", "ascending"), ("id", "ascending")])


def _rows(labels: pa.Table, categories: Mapping[int, str]) -> pa.Table:
    sides = pc.list_flatten(labels["bbox"]).to_numpy().reshape(-1, 4)
    areas = []
    for bbox, width, height in zip(sides, labels["width"].to_pylist(), labels["height"].to_pylist(), strict=True):
        box = boxes.clip(boxes.from_xywh(bbox), width, height)
        assert box is not None, "the index holds only boxes that overlap their image"
        areas.append(boxes.area(box))
    found = {name: labels[name] for name in _SAME} | {
        "category": [categories.get(category, str(category)) for category in labels["category_id"].to_pylist()],
        "band": [boxes.BANDS[band] for band in boxes.band_index(areas).tolist()],
        "box_area": areas,
        "mask_area": labels["area"],
        **{name: sides[:, column] for column, name in enumerate("xywh")},
    }
    return pa.table([found[name] for name in BOXES.names], schema=BOXES)


def write_box_table(table: pa.Table, folder: str, form: str) -> list[str]:
    """Write ``boxes.parquet``, ``boxes.csv`` or ``both`` into ``folder``; returns the paths."""
    paths = []
    for kind in ("parquet", "csv") if form == "both" else (form,):
        path = storage.join(folder, f"boxes.{kind}")
        with storage.open_write(path) as file:
            if kind == "csv":
                pyarrow.csv.write_csv(table, file)
            else:
                pq.write_table(table, file, compression="zstd")
        paths.append(path)
    return paths
