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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from mal import boxes, crops, masks, pasting
from mal.boxes import Box, Window
from mal.data import images
from mal.data.index import build_index
from mal.labelling import shard
from mal.labelling.task import LabelTask, make_task
from mal.pasting import MaskResult
from mal.predictor import BoxItem, Predictor
from mal.resizing import resize_normalised
from mal.spec.load import load_spec

PEER = {"decode": 2.9, "cut, resize, normalise": 3.7 + 2.8, "paste": 3.4, "RLE": 0.5, "rows, parquet": 0.5}
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


@dataclass
class Work:
    """All boxes of a file, and what each stage gives to the next."""

    ann_path: str
    task: LabelTask
    rows: pa.Table
    """The index."""
    records: list[dict[str, Any]]
    """Its images."""
    made: Predictor
    paths: list[str] = field(default_factory=list)
    items: list[BoxItem] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    """Around each box, by the widest margin."""

    def index(self) -> None:
        with tempfile.TemporaryDirectory(prefix="mal-stages-") as folder:
            build_index(self.ann_path, folder)

    def decode(self) -> list[Any]:
        return [images.decode(path, max_pixels=10**9) for path in self.paths]

    def resize(self) -> None:
        out = np.empty((3, self.made.crop_size, self.made.crop_size), np.float32)
        for item, window in zip(self.items, self.windows, strict=True):
            resize_normalised(crops.cut(item.image, window), self.made.crop_size, out)

    def place(self) -> list[pasting.Placement]:
        return [place(item.image, item.box, w, self.made) for item, w in zip(self.items, self.windows, strict=True)]

    def paste(self, placements: Sequence[pasting.Placement]) -> list[MaskResult]:
        batches = [placements[k : k + BATCH] for k in range(0, len(placements), BATCH)]
        logits = self.made.networks[0].logits
        return [result for own in batches for result in pasting.paste([(logits[: len(own)], own)])]  # type: ignore[index]

    def write(self, results: Sequence[MaskResult]) -> None:
        labels = shard._Labels(self.task, shard._Work(self.rows))
        for number, result in enumerate(results):
            labels.add(number, result)
        pq.write_table(labels.table(), io.BytesIO(), compression="zstd")

    def everything(self) -> None:
        given = iter(list(zip(self.records, self.decode(), strict=True)))
        table = shard.label_rows(self.task, self.made, lambda _: given, self.rows)
        pq.write_table(table, io.BytesIO(), compression="zstd")


def prepared(ann_path: str, img_dir: str, crop_size: int) -> Work:
    """Index, images and windows of a file."""
    with tempfile.TemporaryDirectory(prefix="mal-stages-") as folder:
        index = build_index(ann_path, folder)
        spec = load_spec(None, [f"dataset.crop_size={crop_size}", f"inference.batch_size={BATCH}"])
        own = {"folder": folder, "img_dir": img_dir, "checkpoint": "", "model_id": "m"}
        task = make_task(spec, spec.inference, **own, load_mask=False, gpu=False)
        rows = pa.concat_tables(index.read_shard(number) for number in range(index.shards))
    work = Work(ann_path, task, rows, rows.to_pylist(), Predictor(Blobs(crop_size // 4), crop_size=crop_size))
    work.paths = [images.safe_join(img_dir, record["file_name"]) for record in work.records]
    for record, image in zip(work.records, work.decode(), strict=True):
        for box in record["boxes"]:
            inside = boxes.clip(boxes.from_xywh(box["bbox"]), record["width"], record["height"])
            assert inside is not None
            work.items.append(BoxItem(image, inside))
            work.windows.append(boxes.central_window(inside))
    return work


def measure(work: Work, runs: int) -> tuple[dict[str, float], float]:
    """Milliseconds of CPU a box by stage, and of all stages but the index in one go."""
    count = len(work.items)
    placements = work.place()
    results = work.paste(placements)
    parts = []
    for result, placement in zip(results, placements, strict=True):
        window, size = placement.pixels, (placement.height, placement.width)
        mask = masks.decode(result.counts, *size)[window.y0 : window.y1, window.x0 : window.x1]
        parts.append((np.asfortranarray(mask), window, *size))
    spent = {
        "index": cpu_ms(work.index, count, max(runs, 2)),  # the first time Python loads what it needs for it
        "decode": cpu_ms(work.decode, count, runs),
        "cut, resize, normalise": cpu_ms(work.resize, count, runs),
        "box masks": cpu_ms(work.place, count, runs),
        "paste": cpu_ms(lambda: work.paste(placements), count, runs),
        "RLE": cpu_ms(lambda: [masks.encode_bounded(*part) for part in parts], count, runs),
        "rows, parquet": cpu_ms(lambda: work.write(results), count, runs),
    }
    spent["paste"] -= spent["RLE"]
    return spent, cpu_ms(work.everything, count, runs)


def place(image: Any, box: Box, window: Window, made: Predictor) -> pasting.Placement:
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
    torch.set_num_threads(1)
    work = prepared(options.ann_path, options.img_dir, options.crop_size)
    spent, whole = measure(work, options.runs)
    count, pictures = len(work.items), len(work.records)
    print(f"{count} boxes of {pictures} images in {Path(options.img_dir).name}, crop {options.crop_size}")
    print(f"{'ms of CPU a box':<24}{'here':>8}{'peer':>8}")
    for stage, ms in spent.items():
        print(f"{stage:<24}{ms:>8.2f}{PEER.get(stage, 0.0):>8.1f}")
    print(f"{'(a picture)':<24}{0.0:>8.2f}{PEER_PICTURE:>8.1f}")
    peer = sum(PEER.values()) + PEER_PICTURE
    print(f"{'sum':<24}{sum(spent.values()):>8.2f}{peer:>8.1f}   {peer / sum(spent.values()):.1f} times less")
    print(f"{'all in one go':<24}{whole:>8.2f}          (without the index)")
    on_cpu = spent["decode"] + spent["box masks"] + spent["RLE"] + spent["rows, parquet"]
    speed = options.boxes_per_second
    print(
        f"a GPU whose network does {speed:g} boxes/s needs {speed * on_cpu / 1e3:.2f} CPUs "
        f"(decoding, box masks, RLE, rows: {on_cpu:.2f} ms; the rest runs on the GPU), "
        f"{speed * spent['decode'] / 1e3:.2f} of them can be elsewhere (decode: nodes)"
    )


if __name__ == "__main__":
    main()
