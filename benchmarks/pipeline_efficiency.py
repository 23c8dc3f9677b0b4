"""Boxes/s of ``mal inference`` from JSON to merged JSON, over boxes/s of the bare network on prepared crops.

    python benchmarks/pipeline_efficiency.py COCO_JSON IMAGE_FOLDER --arch vit-deit-tiny/16 vit-mae-base/16

Same device, precision, batches and threads; random weights. Both are measured in the actor, alternating: it labels a
shard, then runs the network alone on the very crops of that shard, then comes the next shard. So Ray's own processes,
the machine's other load and the sizes of the boxes are the same for both. Starting Ray and loading the network are
reported apart. Printed is the efficiency by the clock and by CPU seconds (which others on the machine disturb less),
what CPU the stages outside the network take, and how many CPUs a GPU needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mal.data.index import build_index
from mal.inference.merge import merge
from mal.labelling.actor import ShardLabeler
from mal.labelling.run import label_file
from mal.labelling.task import LabelTask
from mal.model.network import build_network
from mal.predictor import BoxItem, Crops, Predictor
from mal.run.cluster import connected
from mal.run.status import StatusLog
from mal.spec.load import load_spec


class Alternating(ShardLabeler):
    """After every shard: the network alone, on the shard's crops. Notes both in the results folder."""

    def __init__(self, task: LabelTask) -> None:
        super().__init__(task)
        self.crops: list[Crops] = []
        self.make_crops = self.predictor.crops_of
        self.predictor.crops_of = self.noted  # type: ignore[method-assign]
        self.note("ready", at=time.time())

    def noted(self, items: Sequence[BoxItem]) -> Crops:
        made = self.make_crops(items)
        self.crops.append(made)
        return made

    def label(self, shard: int) -> tuple[int, int]:
        self.crops = []
        begun, cpu = time.perf_counter(), time.process_time()
        found = super().label(shard)
        pipeline, cpu_pipeline = time.perf_counter() - begun, time.process_time() - cpu
        begun, cpu = time.perf_counter(), time.process_time()
        alone(self.predictor, self.crops)
        bare, cpu_bare = time.perf_counter() - begun, time.process_time() - cpu
        boxes = sum(len(made.batches[0].placements) for made in self.crops)
        self.note("shard", boxes=boxes, pipeline=pipeline, bare=bare, cpu_pipeline=cpu_pipeline, cpu_bare=cpu_bare)
        return found

    def note(self, kind: str, **figures: float) -> None:
        with open(Path(self.task.results_dir, f"{kind}-{os.getpid()}"), "a") as file:
            file.write(json.dumps(figures) + "\n")


def alone(predictor: Predictor, crops: Sequence[Crops]) -> None:
    """Run the network on all ``crops``, and wait for it."""
    for made in crops:
        logits = predictor.answer(made).logits
    if crops:
        logits[-1].sum().item()


def measure(arch: str, decode: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One architecture and one place to decode at."""
    settings = [f"model.arch={arch}", f"inference.checkpoint={folder}/network.pth", f"inference.decode={decode}"]
    settings += [f"inference.batch_size={options.batch_size}", f"inference.precision={options.precision}"]
    settings += [f"inference.cpus_per_actor={options.threads}", f"inference.decode_threads={options.decode_threads}"]
    settings += [f"dataset.crop_size={options.crop_size}", "inference.max_actors=1", "ray.object_store_gb=0.5"]
    spec = load_spec(None, settings)
    torch.manual_seed(0)
    network = build_network(spec.model, crop_size=options.crop_size)
    torch.save(network.state_dict(), folder / "network.pth")
    begun = time.time()
    index = build_index(options.ann_path, str(folder / "run" / "index"))
    indexed = time.time() - begun
    begun = time.time()
    with connected(spec.ray):
        run = label_file(
            spec,
            spec.inference,
            folder=str(folder / "run"),
            ann_path=options.ann_path,
            images_path=None,
            img_dir=options.img_dir,
            load_mask=False,
            status=StatusLog(str(folder)),
            labeler=Alternating,
        )
        ended = time.time()
    merging = time.time()
    counts = merge(index, run.shards, str(folder / "labels.json"), str(folder / "ledger.parquet"))
    merged = time.time() - merging
    ready = min(json.loads(path.read_text().splitlines()[0])["at"] for path in folder.rglob("ready-*"))
    lines = [line for path in folder.rglob("shard-*") for line in path.read_text().splitlines()]
    notes = [json.loads(line) for line in lines]
    total = {name: sum(note[name] for note in notes) for name in notes[0]}
    boxes = counts.labelled + counts.clipped
    assert total["boxes"] == boxes
    around = indexed + merged + (ended - ready) - total["pipeline"] - total["bare"]
    slower = statistics.median(note["pipeline"] / note["bare"] for note in notes)
    slower_cpu = statistics.median(note["cpu_pipeline"] / note["cpu_bare"] for note in notes)
    outside = (total["cpu_pipeline"] - total["cpu_bare"]) / boxes
    return {
        "boxes": boxes,
        "bare boxes/s": boxes / total["bare"],
        "efficiency": 1 / (slower + around / total["bare"]),
        "in the actor": 1 / slower,
        "in the actor, by CPU": 1 / slower_cpu,
        "ms of CPU a box outside the network": outside * 1e3,
        "CPUs to keep the device busy": outside * boxes / total["bare"],
        "index s": indexed,
        "merge s": merged,
        "between shards s": around - indexed - merged,
        "start s": ready - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ann_path")
    parser.add_argument("img_dir")
    parser.add_argument("--arch", nargs="+", default=["vit-deit-tiny/16", "vit-mae-base/16"])
    parser.add_argument("--decode", nargs="+", default=["actor"], choices=("actor", "nodes"))
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the network on a CPU (%(default)s)")
    parser.add_argument("--decode-threads", type=int, default=0, help="0: as `mal inference` chooses")
    options = parser.parse_args()
    print(f"crop {options.crop_size}, batch {options.batch_size}, {options.threads} threads, {options.precision}")
    for arch in options.arch:
        for decode in options.decode:
            with tempfile.TemporaryDirectory(prefix="mal-efficiency-") as folder:
                found = measure(arch, decode, options, Path(folder))
            figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            print(f"{arch}, decode: {decode}: {figures}", flush=True)


if __name__ == "__main__":
    main()
