"""What needs no learning: box-mean IoU of the filled box, the inscribed ellipse and GrabCut on a COCO file with masks.

    pip install -e '.[benchmarks]'
    python benchmarks/rules.py ../shared/coco/val/instances.json ../shared/coco/val/images

GrabCut (Rother et al., SIGGRAPH 2004) at its best of those tried: the window 1.3 times the box, resized to 256 x 256;
outside the box surely background, inside the inscribed ellipse probably foreground, its core of half the radius surely
foreground, the rest of the box probably background; five iterations. Printed: mean IoU over boxes, over classes,
and over the classes of each band; time per box of GrabCut.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mal import boxes, crops, masks
from mal.boxes import Box
from mal.data import images
from mal.data.index import MAX_IMAGE_PIXELS, Index, build_index
from mal.evaluation.baselines import score_rules
from mal.metrics import MaskScores

SIDE = 256
MARGIN = 0.6
CORE = 0.5
ITERATIONS = 5


def grabcut(image: NDArray[np.uint8], box: Box) -> str:
    """RLE counts of GrabCut's mask of one box, cut by the box."""
    height, width = image.shape[:2]
    window = boxes.central_window(box, (MARGIN, MARGIN))
    crop = crops.resize(crops.cut(image, window), SIDE)
    x = window.x0 + (np.arange(SIDE) + 0.5) * window.width / SIDE
    y = window.y0 + (np.arange(SIDE) + 0.5) * window.height / SIDE
    inside = ((y > box.y0) & (y < box.y1))[:, None] & ((x > box.x0) & (x < box.x1))[None, :]
    radius = np.hypot(
        (x[None, :] - (box.x0 + box.x1) / 2) / ((box.x1 - box.x0) / 2),
        (y[:, None] - (box.y0 + box.y1) / 2) / ((box.y1 - box.y0) / 2),
    )
    labels = np.full((SIDE, SIDE), cv2.GC_BGD, np.uint8)
    labels[inside] = cv2.GC_PR_BGD
    labels[inside & (radius <= 1.0)] = cv2.GC_PR_FGD
    labels[inside & (radius <= CORE)] = cv2.GC_FGD
    if (labels & 1).any():  # GrabCut fails without foreground
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)
        cv2.grabCut(crop, labels, (0, 0, 1, 1), *models, ITERATIONS, cv2.GC_INIT_WITH_MASK)
    found = (labels & 1).astype(np.float32)
    whole = cv2.resize(found, (window.width, window.height), interpolation=cv2.INTER_LINEAR) > 0.5
    pixels = boxes.outer_pixels(box, width, height)
    rows = slice(pixels.y0 - window.y0, pixels.y1 - window.y0)
    columns = slice(pixels.x0 - window.x0, pixels.x1 - window.x0)
    return masks.encode(whole[rows, columns], pixels, height, width)


def score_grabcut(index: Index, image_folder: str) -> tuple[MaskScores, float]:
    """Scores of GrabCut on the boxes of an index that has masks, and its seconds per box."""
    scores, seconds, count = MaskScores(), 0.0, 0
    for shard in range(index.shards):
        for row in index.read_shard(shard).to_pylist():
            path = images.safe_join(image_folder, row["file_name"])
            image = images.decode(path, max_pixels=MAX_IMAGE_PIXELS)
            height, width = image.shape[:2]
            for item in row["boxes"]:
                box = boxes.clip(boxes.from_xywh(item["bbox"]), width, height)
                if item["segmentation"] is None or box is None:
                    continue
                begun = time.process_time()
                found = grabcut(image, box)
                seconds, count = seconds + time.process_time() - begun, count + 1
                truth = masks.from_segmentation(json.loads(item["segmentation"]), height, width)
                overlap = masks.iou(masks.rle(found, height, width), truth)
                scores.add(item["category_id"], overlap, boxes.area(box))
    return scores, seconds / max(count, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", help="COCO file with masks")
    parser.add_argument("images", help="folder of its images")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(arguments.annotations, str(Path(folder) / "index"), load_mask=True)
        scores = score_rules(index)
        scores["GrabCut"], seconds = score_grabcut(index, arguments.images)
    print(f"{'IoU':18} boxes  of boxes  of classes  " + "  ".join(f"{band:>6}" for band in boxes.BANDS))
    for name, score in scores.items():
        found = score.result()
        means = [found["mIoU_small"], found["mIoU_medium"], found["mIoU_large"]]
        bands = "  ".join(f"{mean or 0:6.4f}" for mean in means)
        print(f"{name:18} {found['counts']['boxes']:5}  {found['box_mean_iou']:8.4f}  {found['mIoU']:10.4f}  {bands}")
    print(f"GrabCut: {1e3 * seconds:.0f} ms of CPU a box")


if __name__ == "__main__":
    main()
