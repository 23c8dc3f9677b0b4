"""A short sample of a labelling run, to tell how long the whole will take. Nothing is written."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from mal.data.index import Index
from mal.labelling.actor import load_predictor
from mal.labelling.pool import PoolSize, explained
from mal.labelling.shard import label_rows
from mal.labelling.task import LabelTask

IMAGES = 64
"""Most images of a sample."""
SECONDS = 10.0
"""Time after which no further image is begun."""


@dataclass(frozen=True)
class Timing:
    """What one actor took for the sample."""

    boxes: int
    seconds: float
    """For these boxes: decoding, network and masks."""
    start: float
    """Seconds to load the network and for the first image, which is not in the figures above."""

    @property
    def boxes_per_second(self) -> float:
        return self.boxes / self.seconds if self.seconds else 0.0


def spread(index: Index, shards: list[int], images: int = IMAGES) -> list[pa.Table]:
    """About ``images`` rows of rows.INDEX spread evenly over ``shards``, as one table per shard read."""
    chosen = shards[:: max(1, len(shards) // 8)][:8]
    tables = []
    for shard in chosen:
        rows = index.read_shard(shard)
        step = max(1, rows.num_rows * len(chosen) // images)
        tables.append(rows.take(list(range(0, rows.num_rows, step))))
    return tables


def time_here(task: LabelTask, work: list[pa.Table], seconds: float = SECONDS) -> Timing:
    """Label ``work`` in this process, image by image, until it is done or ``seconds`` have passed."""
    begun = time.perf_counter()
    os.environ.update(task.environment)
    predictor = load_predictor(task)
    images = [table.slice(place, 1) for table in work for place in range(table.num_rows)]
    with ThreadPoolExecutor(task.decode_threads) as pool:
        label_rows(task, predictor, pool, images[0])
        started = time.perf_counter()
        boxes = 0
        # In fours, so that decoding overlaps with the network as it does in a real run.
        for first in range(1, len(images), 4):
            boxes += label_rows(task, predictor, pool, pa.concat_tables(images[first : first + 4])).num_rows
            if time.perf_counter() - started > seconds:
                break
        return Timing(boxes, time.perf_counter() - started, started - begun)


def time_on_cluster(task: LabelTask, work: list[pa.Table], size: PoolSize) -> Timing:
    """`time_here` on a node that has what an actor needs.

    Raises:
        MalError: whatever stopped it.
    """
    import ray

    remote = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_retries=0)(time_here)
    try:
        timing: Timing = ray.get(remote.remote(task, work))
    except ray.exceptions.RayError as error:
        raise explained(error) from error
    return timing
