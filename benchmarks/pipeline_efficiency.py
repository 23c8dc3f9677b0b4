"""Boxes/s of ``mal inference`` from JSON to merged JSON, over boxes/s of the bare network on prepared crops.

    python benchmarks/pipeline_efficiency.py COCO_JSON IMAGE_FOLDER --arch vit-deit-tiny/16 vit-mae-base/16

Same device, precision, batch and threads; random weights. The bare network is timed before and after the pipeline, on
boxes spread over the input, in batches of one band as the pipeline makes them; the ratio is to the mean of both.
Starting Ray and loading the network are reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from mal import boxes
from mal.data import images
from mal.data.index import Index, build_index
from mal.inference.merge import merge
from mal.labelling.actor import ShardLabeler
from mal.labelling.run import label_file
from mal.labelling.task import LabelTask
from mal.model.network import build_network
from mal.model.precision import compute_name
from mal.predictor import Batch, BoxItem, Predictor
from mal.run.cluster import connected
from mal.run.status import StatusLog
from mal.spec.load import load_spec
from mal.spec.schema import Spec

BARE_BOXES = 96
"""Boxes of which prepared crops are held in memory."""


class TimedLabeler(ShardLabeler):
    """Notes when it was ready for the first shard."""

    def __init__(self, task: LabelTask) -> None:
        super().__init__(task)
        Path(task.results_dir, f"ready-{os.getpid()}").write_text(str(time.time()))


def prepared(spec: Spec, predictor: Predictor, index: Index, img_dir: str) -> list[Batch]:
    """Batches of one band each, of about BARE_BOXES boxes spread over the input."""
    items: list[list[BoxItem]] = [[] for _ in boxes.BANDS]
    step, count = max(1, index.summary.boxes // BARE_BOXES), 0
    for shard in range(index.shards):
        for row in index.read_shard(shard).to_pylist():
            image = images.decode(images.safe_join(img_dir, row["file_name"]), max_pixels=10**9)
            for box in row["boxes"]:
                count += 1
                if count % step == 0:
                    inside = boxes.clip(boxes.from_xywh(box["bbox"]), row["width"], row["height"])
                    assert inside is not None
                    items[int(boxes.band_index([boxes.area(inside)])[0])].append(BoxItem(image, inside))
    size = spec.inference.batch_size
    return [predictor.prepare(band[k : k + size]) for band in items for k in range(0, len(band), size)]


def bare(predictor: Predictor, batches: list[Batch]) -> float:
    """Boxes/s of the network alone."""
    for batch in {len(b.images): b for b in batches}.values():
        predictor.run(batch)  # warm-up of every shape
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for batch in batches:
        logits = predictor.run(batch)
    logits.sum().item()
    return sum(len(batch.images) for batch in batches) / (time.perf_counter() - begun)


def measure(ann_path: str, img_dir: str, arch: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One architecture."""
    settings = [f"model.arch={arch}", f"inference.checkpoint={folder}/network.pth"]
    settings += [f"inference.batch_size={options.batch_size}", f"inference.precision={options.precision}"]
    settings += [f"inference.cpus_per_actor={options.threads}", f"inference.decode_threads={options.decode_threads}"]
    spec = load_spec(None, [*settings, f"dataset.crop_size={options.crop_size}", "inference.max_actors=1"])
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    network = build_network(spec.model, crop_size=options.crop_size)
    torch.save(network.state_dict(), folder / "network.pth")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = compute_name(spec.inference.precision, device)
    predictor = Predictor(network, crop_size=options.crop_size, device=device, precision=precision)

    begun = time.time()
    index = build_index(ann_path, str(folder / "run" / "index"))
    indexed = time.time() - begun
    batches = prepared(spec, predictor, index, img_dir)
    before = bare(predictor, batches)
    begun = time.time()
    with connected(spec.ray):
        ray_start = time.time() - begun
        begun = time.time()
        run = label_file(
            spec,
            spec.inference,
            folder=str(folder / "run"),
            ann_path=ann_path,
            images_path=None,
            img_dir=img_dir,
            load_mask=False,
            status=StatusLog(str(folder)),
            labeler=TimedLabeler,
        )
        ended = time.time()
    ready = min(float(path.read_text()) for path in folder.rglob("ready-*"))
    after = bare(predictor, batches)
    merging = time.time()
    counts = merge(index, run.shards, str(folder / "labels.json"), str(folder / "ledger.parquet"))
    merged = time.time() - merging
    seconds = indexed + (ended - ready) + merged
    return {
        "boxes": counts.labelled + counts.clipped,
        "bare": (before + after) / 2,
        "bare_spread": abs(before - after) / (before + after) * 2,
        "pipeline": (counts.labelled + counts.clipped) / seconds,
        "index_s": indexed,
        "label_s": ended - ready,
        "merge_s": merged,
        "start_s": ray_start + ready - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ann_path")
    parser.add_argument("img_dir")
    parser.add_argument("--arch", nargs="+", default=["vit-deit-tiny/16", "vit-mae-base/16"])
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the network on a CPU (%(default)s)")
    parser.add_argument("--decode-threads", type=int, default=0, help="0: as `mal inference` chooses")
    options = parser.parse_args()
    print(f"crop {options.crop_size}, batch {options.batch_size}, {options.threads} threads, {options.precision}")
    for arch in options.arch:
        with tempfile.TemporaryDirectory(prefix="mal-efficiency-") as folder:
            found = measure(options.ann_path, options.img_dir, arch, options, Path(folder))
        print(json.dumps({"arch": arch, **{name: round(value, 3) for name, value in found.items()}}))
        ratio, spread = found["pipeline"] / found["bare"], found["bare_spread"]
        print(
            f"{arch}: efficiency {ratio:.2f} (the bare network differed by {spread:.0%} before and after)", flush=True
        )


if __name__ == "__main__":
    main()
