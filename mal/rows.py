"""The tables that flow between the stages, as Arrow schemas, and the words for what became of a box.

input JSON --coco--> INDEX rows (one per image) --labelling--> LABELS rows (one per box) --merge--> output JSON
                \\--> LEDGER rows (boxes not labelled) ------------------------------------> ledger.parquet
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Outcome = Literal["labelled", "clipped", "crowd", "rejected"]
"""What became of an input annotation. ``clipped``: labelled, after its box was clipped to the image. ``crowd``: kept
as it was. Every annotation has exactly one outcome: in = labelled + clipped + crowd + rejected."""

BOX = pa.struct(
    [
        pa.field("position", pa.int64(), nullable=False),  # 0-based place in the input's list of annotations
        pa.field("id", pa.int64(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("bbox", pa.list_(pa.float64(), 4), nullable=False),  # x, y, w, h in pixels, exactly as given
        pa.field("score", pa.float64()),  # of the input, if it had one
        pa.field("clipped", pa.bool_(), nullable=False),  # the box leaves its image
        pa.field("segmentation", pa.string()),  # JSON text of the input's mask, when masks are loaded
        pa.field("carried", pa.string()),  # JSON object of the fields that MAL does not understand
    ]
)

INDEX = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),  # relative to the image folder
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("boxes", pa.list_(BOX), nullable=False),
    ]
)
"""The table of work: one row per image with its boxes (several rows for an image with very many boxes). One row group
of ``index.parquet`` is one shard of work."""

LABELS = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("bbox", pa.list_(pa.float64(), 4), nullable=False),  # exactly as in the input
        pa.field("score", pa.float64()),
        pa.field("clipped", pa.bool_(), nullable=False),
        pa.field("carried", pa.string()),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # of the image, as in the RLE's "size"
        pa.field("width", pa.int32(), nullable=False),
        pa.field("counts", pa.string()),  # compressed COCO RLE of the image-sized mask; null if rejected
        pa.field("area", pa.int64()),  # mask pixels
        pa.field("iou", pa.float64()),  # with the input's mask, when masks are loaded
        pa.field("boundary_iou", pa.float64()),  # the same of what is near the outlines (`mal.masks.boundary_iou`)
        pa.field("quality", pa.float32()),  # our estimate of the mask's IoU, 0..1 (`mal.quality`)
        pa.field("mean_probability", pa.float32()),  # what the estimate is made of: `mal.quality.Evidence`
        pa.field("stability", pa.float32()),
        pa.field("tightness", pa.float32()),
        pa.field("agreement", pa.float32()),  # null if there was one opinion alone
        pa.field("overlap", pa.float32()),
        pa.field("model", pa.string(), nullable=False),  # fingerprint of the checkpoint that made the mask
        pa.field("reason", pa.string()),  # why the box was rejected; null if labelled
    ]
)
"""One row per box of a finished shard, in the order of ``position`` within the shard."""

LEDGER = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("id", pa.int64()),  # null where the input has none that is usable
        pa.field("image_id", pa.int64()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),  # why it is rejected, or what its mask is marked for: REASONS, and the value
    ]
)
"""The account of every input annotation."""

KEPT = pa.schema([pa.field("position", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)])
"""Crowd annotations: the JSON text of each, to be put into the output as it was."""

REASONS = {
    "not_an_object": "the annotation is not a JSON object",
    "bad_id": "the id is missing or not an integer of at most 63 bits",
    "duplicate_id": "an earlier annotation has the same id",
    "bad_image_id": "the image_id is missing or not an integer",
    "unknown_image": "no image of the file has this image_id",
    "bad_category": "the category_id is missing or not an integer",
    "bad_bbox": "the bbox is missing or not a list of four numbers",
    "not_finite": "the bbox holds NaN or an infinite number",
    "empty_box": "a side of the bbox, or its area, is zero or negative",
    "outside": "the bbox does not overlap its image",
    "bad_image_record": "the image's record lacks a usable file_name, width or height",
    "unsafe_path": "the image's file_name leaves the image folder",
    "missing_image": "the image file does not exist",
    "unreadable_image": "the image file cannot be decoded",
    "size_differs": "the decoded image has another size than its record",
    "too_large": "the image has more pixels than dataset.max_image_pixels",
    "crashed": "labelling this image killed its process again and again",
    "failed": "labelling this image raised an error",
    "low_quality": "the mask's quality is below inference.min_quality (inference.low_quality: mark or drop)",
}
"""Reason code -> meaning. In tables a reason is written ``code`` or ``code: detail``."""
