"""What labelling costs apart from the network and the images: index, Ray, rows, shards, merge, for 10^4 to 10^6 boxes.

    python benchmarks/labelling_overhead.py --boxes 10000 100000 1000000

Actors have no network (every mask is its box, encoded as usual) and no image files (every image is black). Seven boxes
an image. Each size runs in a process of its own. Printed: seconds of each stage, cost per box, peak memory of driver
and actor, the object store's peak and what was spilled, and the line fitted through the totals.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from index_speed import write_input
from numpy.typing import NDArray

from mal import masks
from mal.boxes import outer_pixels
from mal.data.index import build_index
from mal.inference.merge import merge
from mal.labelling.actor import ShardLabeler
from mal.labelling.run import label_file
from mal.predictor import BoxItem, MaskResult, Predictor
from mal.run.cluster import connected
from mal.run.status import StatusLog
from mal.spec.load import load_spec

STAGES = ("index", "label", "merge")


class FullBoxes(Predictor):
    """A predictor without a network: the mask is the box."""

    def __init__(self) -> None:
        pass

    def crops_of(self, items: Sequence[BoxItem]) -> Any:
        return items

    def answer(self, crops: Any) -> Any:
        return crops

    def masks_of(self, answer: Any) -> list[MaskResult]:
        return [self._mask(item) for item in answer]

    def _mask(self, item: BoxItem) -> MaskResult:
        height, width = item.image.shape[:2]
        pixels = outer_pixels(item.box, width, height)
        mask = np.ones((pixels.height, pixels.width), np.uint8, order="F")
        counts, bounds = masks.encode_bounded(mask, pixels, height, width)
        return MaskResult(counts, mask.size, 1.0, 1.0, bounds)


class NullLabeler(ShardLabeler):
    """Neither network nor images; notes its peak memory beside the shards."""

    black = np.zeros((640, 640, 3), np.uint8)

    def load(self) -> Predictor:
        return FullBoxes()

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        return self.black[: record["height"], : record["width"]]

    def label(self, shard: int) -> tuple[int, int]:
        done = super().label(shard)
        Path(self.task.results_dir, f"peak-{os.getpid()}").write_text(f"{_peak()} {time.process_time()}")
        return done


def _peak() -> int:
    """Bytes of this process at their peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StoreWatch(threading.Thread):
    """Looks at Ray's object store twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.spilled = 0
        self._over = threading.Event()

    def run(self) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self._over.wait(0.5):
            stats = get_memory_info_reply(state).store_stats
            self.peak = max(self.peak, stats.object_store_bytes_used)
            self.spilled = max(self.spilled, stats.spilled_bytes_total)

    def stop(self) -> None:
        self._over.set()
        self.join()


def run_once(boxes: int, actors: int) -> dict[str, float]:
    """All stages for one size. Generating the input and starting Ray are not counted."""
    with tempfile.TemporaryDirectory(prefix="mal-overhead-") as temporary:
        folder = Path(temporary)
        write_input(folder / "in.json", boxes, box_only=True)
        (folder / "none.pth").write_bytes(b"none")
        spec = load_spec(None, ["ray.object_store_gb=0.5", "inference.cpus_per_actor=0.5"])
        pool = spec.inference.__class__(
            checkpoint=str(folder / "none.pth"), batch_size=64, cpus_per_actor=0.5, max_actors=actors
        )
        seconds = {}
        begun = time.perf_counter()
        index = build_index(str(folder / "in.json"), str(folder / "run" / "index"))
        seconds["index"] = time.perf_counter() - begun
        with connected(spec.ray):
            watch = StoreWatch()
            watch.start()
            run = label_file(
                spec,
                pool,
                folder=str(folder / "run"),
                ann_path=str(folder / "in.json"),
                images_path=None,
                img_dir=temporary,
                load_mask=False,
                status=StatusLog(temporary),
                labeler=NullLabeler,
            )
            watch.stop()
        seconds["label"] = run.seconds
        begun = time.perf_counter()
        counts = merge(index, run.shards, str(folder / "labels.json"), str(folder / "ledger.parquet"))
        seconds["merge"] = time.perf_counter() - begun
        assert counts.total == boxes
        assert not counts.rejected, counts
        notes = [path.read_text().split() for path in folder.rglob("peak-*")]
        peaks, actors_cpu = [int(note[0]) for note in notes], sum(float(note[1]) for note in notes)
        sizes = {"shards": len(run.shards), "output_mb": (folder / "labels.json").stat().st_size / 1e6}
        memory = {"driver_mb": _peak() / 1e6, "actor_mb": max(peaks) / 1e6}
        return {
            "boxes": boxes,
            **seconds,
            **sizes,
            **memory,
            "store_mb": watch.peak / 1e6,
            "spilled": watch.spilled,
            "actor_cpu": actors_cpu,
            "driver_cpu": time.process_time(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--boxes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--actors", type=int, default=1, help="actors without a network (%(default)s)")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print("RESULT", json.dumps(run_once(options.once, options.actors)))
        return
    results = []
    for boxes in options.boxes:
        command = [sys.executable, __file__, "--once", str(boxes), "--actors", str(options.actors)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.rpartition("RESULT")[2]))
        print(report(results[-1]), flush=True)
    if len(results) > 1:
        print(fit(results))


def report(result: dict[str, float]) -> str:
    """One size in a few lines."""
    total = sum(result[stage] for stage in STAGES)
    stages = ", ".join(
        f"{stage} {result[stage]:.1f} s ({result[stage] / result['boxes'] * 1e6:.0f} us a box)" for stage in STAGES
    )
    return (
        f"{result['boxes']:,.0f} boxes in {result['shards']:,.0f} shards: {total:.1f} s, "
        f"{result['boxes'] / total:,.0f} boxes/s, {total / result['boxes'] * 1e6:.0f} us a box\n"
        f"  {stages}; {result['output_mb'] / result['merge']:.0f} MB/s merged\n"
        f"  CPU with start-up: driver {result['driver_cpu']:.1f} s, actors {result['actor_cpu']:.1f} s\n"
        f"  peak memory: driver {result['driver_mb']:,.0f} MB, actor {result['actor_mb']:,.0f} MB, "
        f"object store {result['store_mb']:.1f} MB; spilled {result['spilled']:,.0f} bytes"
    )


def fit(results: list[dict[str, float]]) -> str:
    """The line through the totals by least squares of relative errors, and how far each size is from it."""
    boxes = np.array([result["boxes"] for result in results])
    totals = np.array([sum(result[stage] for stage in STAGES) for result in results])
    design = np.stack([np.ones_like(boxes), boxes], axis=1) / totals[:, None]
    (fixed, each), *_ = np.linalg.lstsq(design, np.ones(len(boxes)), rcond=None)
    off = ", ".join(f"{n:,.0f}: {(fixed + each * n) / t - 1:+.0%}" for n, t in zip(boxes, totals, strict=True))
    return f"fit: {fixed:.1f} s + {each * 1e6:.0f} us a box; the line against the measurement: {off}"


if __name__ == "__main__":
    main()
