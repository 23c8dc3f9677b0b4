"""Numbers and paths that follow from a spec. Pure functions: nothing is written back into it."""

from __future__ import annotations

import re
from typing import Literal

from mal import storage
from mal.spec.schema import EvaluateSpec, InferenceSpec, PoolSpec, Spec, TrainSpec

Action = Literal["train", "evaluate", "inference"]
ACTIONS: tuple[Action, ...] = ("train", "evaluate", "inference")


def section(spec: Spec, action: Action) -> TrainSpec | EvaluateSpec | InferenceSpec:
    """The section of one task."""
    sections: dict[str, TrainSpec | EvaluateSpec | InferenceSpec] = {
        "train": spec.train,
        "evaluate": spec.evaluate,
        "inference": spec.inference,
    }
    return sections[action]


def results_dir(spec: Spec, action: Action) -> str:
    """The task's folder, absolute: its own ``results_dir``, else ``<results_dir>/<action>``."""
    own = section(spec, action).results_dir
    return storage.absolute(own or storage.join(spec.results_dir, action))


def per_node(task: TrainSpec | PoolSpec) -> int:
    """GPUs (or CPU workers) per node: when ``num_gpus`` and ``gpu_ids`` disagree the larger wins."""
    return max(task.num_gpus, len(set(task.gpu_ids)))


def train_workers(spec: Spec) -> int:
    """Training workers on all nodes."""
    return max(spec.num_nodes, spec.train.num_nodes) * per_node(spec.train)


def max_actors(spec: Spec, pool: PoolSpec) -> int:
    """Most actors at a time."""
    return pool.max_actors or max(spec.num_nodes * per_node(pool), pool.min_actors)


def label_dump_path(spec: Spec) -> str:
    """Where the merged COCO file of the inference task goes."""
    own = spec.inference.label_dump_path
    return storage.absolute(own or storage.join(results_dir(spec, "inference"), "labels.json"))


def shards_folder(label_path: str) -> str:
    """Where the COCO files per shard go: ``labels`` for ``labels.json`` and ``labels.json.gz``."""
    return label_path.removesuffix(".gz").removesuffix(".json")


SHARD_LABELS = re.compile(r"(part-\d{6,}|rest)\.json(\.gz)?")
"""Names of the files in it."""
