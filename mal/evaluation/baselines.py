"""Masks that need no learning, to compare with: the filled box and the ellipse inscribed in it."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from mal import boxes, masks
from mal.boxes import Box
from mal.data.index import Index
from mal.metrics import MaskScores


def filled_box(box: Box, height: int, width: int) -> str:
    """RLE counts of all pixels whose centre is in the box."""
    window = boxes.outer_pixels(box, width, height)
    inside_y, inside_x = _centres(box, window)
    return masks.encode(inside_y[:, None] & inside_x[None, :], window, height, width)


def inscribed_ellipse(box: Box, height: int, width: int) -> str:
    """RLE counts of all pixels whose centre is in the ellipse that touches the box's four sides."""
    window = boxes.outer_pixels(box, width, height)
    y = (np.arange(window.y0, window.y1) + 0.5 - (box.y0 + box.y1) / 2) / ((box.y1 - box.y0) / 2)
    x = (np.arange(window.x0, window.x1) + 0.5 - (box.x0 + box.x1) / 2) / ((box.x1 - box.x0) / 2)
    return masks.encode(y[:, None] ** 2 + x[None, :] ** 2 <= 1.0, window, height, width)


def _centres(box: Box, window: boxes.Window) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    y, x = np.arange(window.y0, window.y1) + 0.5, np.arange(window.x0, window.x1) + 0.5
    return (y > box.y0) & (y < box.y1), (x > box.x0) & (x < box.x1)


RULES = {"filled box": filled_box, "inscribed ellipse": inscribed_ellipse}


def score_rules(index: Index) -> dict[str, MaskScores]:
    """Scores of every rule on the boxes of an index that has masks."""
    scores = {name: MaskScores() for name in RULES}
    for shard in range(index.shards):
        for row in index.read_shard(shard).to_pylist():
            height, width = row["height"], row["width"]
            for item in row["boxes"]:
                box = boxes.clip(boxes.from_xywh(item["bbox"]), width, height)
                if item["segmentation"] is None or box is None:
                    continue
                truth = masks.from_segmentation(json.loads(item["segmentation"]), height, width)
                for name, rule in RULES.items():
                    found = masks.rle(rule(box, height, width), height, width)
                    scores[name].add(item["category_id"], masks.iou(found, truth), boxes.area(box))
    return scores
