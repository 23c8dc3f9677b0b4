"""The actor of the labelling pool: loads the network once, then labels shard after shard.

A plain class with ``__init__`` and ``__call__``; Ray Data makes actors of it, tests call it directly.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mal import rows, storage
from mal.data.index import open_index
from mal.labelling.attempts import Attempts, one_by_one
from mal.labelling.shard import label_rows
from mal.labelling.task import LabelTask
from mal.model.network import MalNetwork, build_network
from mal.model.precision import compute_name
from mal.model.weights import load_network, read_checkpoint
from mal.predictor import Predictor

REPORT = pa.schema(
    [
        ("shard", pa.int64()),
        ("boxes", pa.int64()),
        ("rejected", pa.int64()),
        ("seconds", pa.float64()),
        ("actor", pa.string()),
    ]
)
"""What an actor sends back for a shard. The rows themselves go straight to storage."""


class ShardLabeler:
    """Labels the shards it is given and writes each to its parquet file."""

    def __init__(self, task: LabelTask) -> None:
        self.task = task
        self.index = open_index(task.index_folder)
        self.pool = ThreadPoolExecutor(task.decode_threads, thread_name_prefix="decode")
        self.predictor = load_predictor(task)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch``: a column ``shard`` of shard numbers. Returns REPORT, one row per shard."""
        return pa.concat_tables([self.label(int(shard)) for shard in batch["shard"].to_pylist()])

    def label(self, shard: int) -> pa.Table:
        """Label one shard, unless its file is there already. Returns one row of REPORT."""
        begun = time.perf_counter()
        path = self.task.shard_path(shard)
        if storage.exists(path):  # an earlier attempt wrote it and died before it could say so
            with storage.open_read(path) as file:
                labels = pq.read_table(file, columns=["reason"])
        else:
            labels = self._label(shard)
            with storage.open_write(path) as file:
                pq.write_table(labels, file, compression="zstd")
        rejected = labels.num_rows - labels["reason"].null_count
        report = {
            "shard": shard,
            "boxes": labels.num_rows,
            "rejected": rejected,
            "seconds": time.perf_counter() - begun,
            "actor": actor_name(),
        }
        return pa.Table.from_pylist([report], schema=REPORT)

    def _label(self, shard: int) -> pa.Table:
        work = self.index.read_shard(shard)
        account = Attempts.begin(self.task.attempts_path(shard))
        if account.careful:
            poisoned = account.poisoned

            def one(place: int) -> pa.Table:
                bad = [0] if place in poisoned else []
                return label_rows(self.task, self.predictor, self.pool, work.slice(place, 1), poisoned=bad)

            tables = one_by_one(account, work.num_rows, one)
            labels = pa.concat_tables(tables).sort_by("position") if tables else rows.LABELS.empty_table()
        else:
            labels = label_rows(self.task, self.predictor, self.pool, work)
        account.end()
        return labels


def actor_name() -> str:
    """Ray's id of this actor; empty outside Ray."""
    import ray

    return ray.get_runtime_context().get_actor_id() or "" if ray.is_initialized() else ""


def load_predictor(task: LabelTask) -> Predictor:
    """The predictor of a task: network built, weights loaded, on its device.

    Raises:
        CheckpointError: the checkpoint does not fit the spec's model.
    """
    if not task.use_gpu:
        torch.set_num_threads(task.threads)
    device = torch.device("cuda" if task.use_gpu else "cpu")
    checkpoint = read_checkpoint(task.checkpoint)
    model = dataclasses.replace(task.model, pretrained=False)  # the weights come from the checkpoint

    def network(which: Literal["student", "teacher"]) -> MalNetwork:
        built = build_network(model, crop_size=task.crop_size, stem=checkpoint.stem)
        load_network(built, checkpoint, which=which)
        return built

    return Predictor(
        network("teacher" if task.use_teacher else "student"),
        mix_with=network("teacher") if task.use_mixed else None,
        crop_size=task.crop_size,
        mask_threshold=task.mask_thres,
        margin_rate=task.margin_rate,
        device=device,
        precision=compute_name(task.precision, device),
        flip=task.use_flip,
    )
