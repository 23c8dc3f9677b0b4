"""`cost_simulator.py --check`: real labelling with 1, 2 and 4 local actors against the simulation.

The actors sleep in place of a network, so two cores carry four of them. A short run with one actor calibrates.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_simulator import Costs, Fleet, simulate
from index_speed import write_input
from labelling_overhead import FullBoxes, NullLabeler

from mal.labelling.run import label_file
from mal.predictor import BoxItem, Predictor
from mal.run.cluster import connected
from mal.run.status import StatusLog
from mal.spec.load import load_spec
from mal.spec.schema import RaySpec

TOLERANCE = 0.15
"""Most that the simulation may be off, as a part of the measured time."""
ACTORS = (1, 2, 4)
BOX_SECONDS = 0.02
SHARD_BOXES = 70


class Sleeping(FullBoxes):
    """As long as a network would take; the masks are the boxes."""

    def answer(self, crops: Sequence[BoxItem]) -> Any:
        time.sleep(BOX_SECONDS * len(crops))
        return super().answer(crops)


class SleepingLabeler(NullLabeler):
    """Neither network nor images: two cores carry four of it."""

    def load(self) -> Predictor:
        return Sleeping()

    def label(self, shard: int) -> tuple[int, int]:
        begun = time.time()
        done = super().label(shard)
        with Path(self.task.results_dir, f"times-{os.getpid()}").open("a") as file:
            file.write(f"{begun} {time.time()}\n")
        return done


@dataclass(frozen=True)
class Measured:
    """A real run: seconds from its beginning."""

    seconds: float
    ends: list[float]
    """Of every shard, sorted."""
    first: float
    """When the first shard was begun."""
    boxes: int
    """Labelled: a little less than asked for, as some made boxes lie outside their images."""

    @property
    def shard_boxes(self) -> int:
        """Mean of the shards; images are not divided, so they hold a little less than `SHARD_BOXES`."""
        return round(self.boxes / len(self.ends))


def measure(boxes: int, actors: int) -> Measured:
    """Label ``boxes`` boxes with so many actors that sleep in place of a network, by the pool that labels always."""
    with tempfile.TemporaryDirectory(prefix="mal-cost-") as temporary:
        folder = Path(temporary)
        write_input(folder / "in.json", boxes, box_only=True)
        (folder / "none.pth").write_bytes(b"none")
        spec = load_spec(
            None,
            [
                *(f"inference.checkpoint={folder}/none.pth", f"inference.shard_boxes={SHARD_BOXES}"),
                *("inference.batch_size=1", f"inference.max_actors={actors}", f"inference.min_actors={actors}"),
                "inference.cpus_per_actor=0.5",
            ],
        )
        run = label_file(
            spec,
            spec.inference,
            folder=str(folder / "run"),
            ann_path=str(folder / "in.json"),
            images_path=None,
            img_dir=temporary,
            load_mask=False,
            status=StatusLog(temporary),
            labeler=SleepingLabeler,
        )
        over = time.time()
        lines = [line for path in folder.rglob("times-*") for line in path.read_text().splitlines()]
        times = [tuple(map(float, line.split())) for line in lines]
        begun = over - run.seconds
        assert len(times) == len(run.shards)
        ends = sorted(end - begun for _, end in times)
        return Measured(run.seconds, ends, min(start for start, _ in times) - begun, run.boxes)


def calibrated(short: Measured) -> Costs:
    """The costs that a short run with one actor shows."""
    period = (short.ends[-1] - short.ends[0]) / (len(short.ends) - 1)
    shard_s = period - short.shard_boxes * BOX_SECONDS
    if shard_s < 0:
        raise AssertionError(f"a shard took {period:.2f} s: the actors do not sleep, and nothing is measured")
    return Costs(BOX_SECONDS * 1000, shard_s=shard_s, start_s=short.first, start_cpu_s=short.first)


def check(seconds: float) -> int:
    """Real runs against the simulation; returns the exit code: 1 if one is off by more than TOLERANCE."""
    boxes = int(seconds / BOX_SECONDS / SHARD_BOXES) * SHARD_BOXES
    cpus, worst = os.cpu_count() or 1, 0.0
    with connected(RaySpec(num_cpus=4, object_store_gb=0.5)):
        measure(2 * SHARD_BOXES, 1)  # Ray's and the disk's first time
        costs = calibrated(measure(12 * SHARD_BOXES, 1))
        print(
            f"calibrated with one actor: {costs.shard_s * 1000:.0f} ms a shard, start {costs.start_s:.1f} s", flush=True
        )
        for actors in ACTORS:
            found = measure(boxes, actors)
            told = simulate(found.boxes, found.shard_boxes, costs, Fleet(actors, cpus)).labelling_s
            off = told / found.seconds - 1
            worst = max(worst, abs(off))
            print(f"{found.boxes:,} boxes, {actors} actors: measured {found.seconds:.1f} s (start {found.first:.1f}), "
                  f"simulated {told:.1f} s: {off:+.0%}", flush=True)  # fmt: skip
    print(f"within {TOLERANCE:.0%}: {'yes' if worst <= TOLERANCE else 'NO'} (worst {worst:.0%})")
    return int(worst > TOLERANCE)
