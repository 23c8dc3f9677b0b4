"""CPU time per box of every stage of labelling but the network, on real images, beside what the peer's stages take.

    python benchmarks/stages.py COCO_JSON IMAGE_FOLDER [--crop-size 512] [--boxes-per-second 100]

One thread; each stage is run over all boxes at once and measured in CPU seconds, so that others on the machine disturb
it little; the least of several runs counts. Logits are made up: smooth blobs of the size that the network gives.
``--boxes-per-second`` is how fast a GPU's network is: printed is how many CPUs keep it busy.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from mal import boxes, crops, masks, pasting, predictor
from mal.boxes import Box
from mal.data import images
from mal.data.index import build_index
from mal.labelling import shard
from mal.labelling.task import make_task
from mal.predictor import Predictor
from mal.spec.load import load_spec

PEER = {"decode": 2.9, "cut and resize": 3.7, "normalise": 2.8, "paste": 3.4, "RLE": 0.5, "rows, parquet": 0.5}
"""Milliseconds of CPU a box, of the peer (its collating stands beside our rows)."""
PEER_PICTURE = 6.3
"""And for a picture that nobody sees."""
BATCH = 4


class Blobs(torch.nn.Module):
    """Logits of ``[B, side, side]`` without looking at the images."""

    def __init__(self, side: int) -> None:
        super().__init__()
        rough = 3 * torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        self.logits = F.interpolate(rough, size=(side, side), mode="bicubic")[:, 0]

    def forward(self, batch: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(batch)]


def cpu_ms(work: Callable[[], Any], boxes: int, runs: int) -> float:
    """Milliseconds of CPU a box, at best."""
    found = []
    for _ in range(runs):
        begun = time.process_time()
        work()
        found.append((time.process_time() - begun) / boxes * 1e3)
    return min(found)


def measure(ann_path: str, img_dir: str, crop_size: int, runs: int) -> tuple[dict[str, float], float, int, int]:
    """Milliseconds by stage, of all stages in one go, and how many boxes and images there were."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mal-stages-") as folder:
        begun = time.process_time()
        index = build_index(ann_path, folder)
        indexed = time.process_time() - begun
        spec = load_spec(None, [f"dataset.crop_size={crop_size}", f"inference.batch_size={BATCH}"])
        own = {"folder": folder, "img_dir": img_dir, "checkpoint": "", "model_id": "m"}
        task = make_task(spec, spec.inference, **own, load_mask=False, gpu=False)
        rows = pa.concat_tables(index.read_shard(number) for number in range(index.shards))
    records = rows.to_pylist()
    paths = [images.safe_join(img_dir, record["file_name"]) for record in records]

    def decode() -> list[Any]:
        return [images.decode(path, max_pixels=10**9) for path in paths]

    pixels = decode()
    items = []
    for record, image in zip(records, pixels, strict=True):
        for box in record["boxes"]:
            inside = boxes.clip(boxes.from_xywh(box["bbox"]), record["width"], record["height"])
            assert inside is not None
            items.append((image, inside, boxes.central_window(inside)))
    count = len(items)
    made = Predictor(Blobs(crop_size // 4), crop_size=crop_size)
    one = torch.empty(BATCH, 3, crop_size, crop_size)
    resized = [
        predictor._resize(predictor._upload([crops.cut(image, window)], made.device)[0], crop_size, whole=True)
        for image, _, window in items[:BATCH]
    ]

    def resize() -> None:
        for image, _, window in items:
            predictor._resize(predictor._upload([crops.cut(image, window)], made.device)[0], crop_size, whole=True)

    def normalise() -> None:
        for _ in range(count // BATCH):
            for k in range(BATCH):
                predictor._normalised_into(one[k], resized[k])

    batches = [items[k : k + BATCH] for k in range(0, count, BATCH)]
    places = [[place(image, box, window, made) for image, box, window in batch] for batch in batches]

    def placements() -> None:
        for image, box, window in items:
            place(image, box, window, made)

    def paste() -> list[Any]:
        return [pasting.paste([(made.networks[0].logits[: len(own)], own)]) for own in places]

    results = [result for found in paste() for result in found]
    windows = [p.pixels for own in places for p in own]
    parts = []
    for result, window, (image, *_) in zip(results, windows, items, strict=True):
        mask = masks.decode(result.counts, *image.shape[:2])[window.y0 : window.y1, window.x0 : window.x1]
        parts.append((np.asfortranarray(mask), window, *image.shape[:2]))

    def encode() -> None:
        for part in parts:
            masks.encode_bounded(*part)

    def write_rows() -> None:
        labels = shard._Labels(task, shard._Work(rows))
        for number, result in enumerate(results):
            labels.add(number, result)
        pq.write_table(labels.table(), io.BytesIO(), compression="zstd")

    def everything() -> None:
        given = iter([(record, image) for record, image in zip(records, decode(), strict=True)])
        pq.write_table(shard.label_rows(task, made, lambda _: given, rows), io.BytesIO(), compression="zstd")

    spent = {
        "index": indexed / count * 1e3,
        "decode": cpu_ms(decode, count, runs),
        "cut and resize": cpu_ms(resize, count, runs),
        "normalise": cpu_ms(normalise, count, runs),
        "box masks": cpu_ms(placements, count, runs),
        "paste": cpu_ms(paste, count, runs),
        "RLE": cpu_ms(encode, count, runs),
        "rows, parquet": cpu_ms(write_rows, count, runs),
    }
    spent["paste"] -= spent["RLE"]
    return spent, cpu_ms(everything, count, runs), count, len(records)


def place(image: Any, box: Box, window: boxes.Window, made: Predictor) -> pasting.Placement:
    """Where a crop's mask belongs, as `Predictor.prepare` notes it."""
    height, width = image.shape[:2]
    rows, columns = crops.box_mask_axes(window, box, width, height, made.crop_size)
    inside = boxes.outer_pixels(box, width, height)
    return pasting.Placement(window, inside, rows, columns, height, width, made.thresholds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ann_path")
    parser.add_argument("img_dir")
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--boxes-per-second", type=float, default=100.0, help="of a GPU's network (%(default)s)")
    options = parser.parse_args()
    spent, whole, count, pictures = measure(options.ann_path, options.img_dir, options.crop_size, options.runs)
    print(f"{count} boxes of {pictures} images in {Path(options.img_dir).name}, crop {options.crop_size}")
    print(f"{'ms of CPU a box':<20}{'here':>8}{'peer':>8}")
    for stage, ms in spent.items():
        print(f"{stage:<20}{ms:>8.2f}{PEER.get(stage, 0.0):>8.1f}")
    print(f"{'(a picture)':<20}{0.0:>8.2f}{PEER_PICTURE:>8.1f}")
    peer = sum(PEER.values()) + PEER_PICTURE
    print(f"{'sum':<20}{sum(spent.values()):>8.2f}{peer:>8.1f}   {peer / sum(spent.values()):.1f} times less")
    print(f"{'all in one go':<20}{whole:>8.2f}          (without the index)")
    on_cpu = spent["decode"] + spent["box masks"] + spent["RLE"] + spent["rows, parquet"]
    speed = options.boxes_per_second
    print(
        f"a GPU whose network does {speed:g} boxes/s needs {speed * on_cpu / 1e3:.2f} CPUs "
        f"(decoding, box masks, RLE, rows: {on_cpu:.2f} ms; the rest runs on the GPU), "
        f"{speed * spent['decode'] / 1e3:.2f} of them can be elsewhere (decode: nodes)"
    )


if __name__ == "__main__":
    main()
