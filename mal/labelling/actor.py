"""The actor of the labelling pool: loads the network once, then labels shard after shard.

A plain class with ``__init__`` and ``__call__``; Ray Data makes actors of it, tests call it directly.

What can go wrong with one image, and what becomes of it:

    it cannot be used (`ImageError`)         its boxes are rejected with that reason
    its work raises something else           the shard is done again image by image; its boxes are rejected as `failed`
    its work kills the process               `mal.labelling.attempts` finds it; its boxes are rejected as `crashed`
    it kills the CPU worker that decodes it  `mal.labelling.decoding` finds it; its boxes are rejected as `crashed`
    every image of a shard fails, and some   not the images' fault: the run stops with the error
    of other shards too
    after an error the network fails too     the process is of no use any more (a GPU's errors stay): it ends, which Ray
                                             mends with a new one, and which counts as killed by the image
    storage or CPU workers cannot be reached the run stops with the error
    the disk is full                         the run stops with the error
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mal import pretrained, storage
from mal.boxes import Box
from mal.data.index import open_index
from mal.errors import CheckpointError, ClusterError, MalError, StorageError
from mal.labelling.attempts import Attempts, one_by_one
from mal.labelling.decoding import Decode, Images, InThreads, OnNodes, decode_image
from mal.labelling.shard import label_rows, rejected_rows
from mal.labelling.task import LabelTask, Sealed, file_fingerprint
from mal.labelling.waiting import Waiting
from mal.model.network import MalNetwork, build_network
from mal.model.precision import compute_name
from mal.model.weights import load_network, read_checkpoint
from mal.predictor import BoxItem, Predictor
from mal.run import pause

REPORT = pa.schema(
    [
        ("shard", pa.int64()),
        ("boxes", pa.int64()),
        ("rejected", pa.int64()),
        ("seconds", pa.float64()),
        ("waited", pa.float64()),  # of these, how long the network waited for images
        ("actor", pa.string()),
        ("error", pa.binary()),  # a pickled MalError, after which the run stops; null if the shard is done
    ]
)
"""What an actor sends back for a shard. The rows themselves go straight to storage. Errors are sent as well, since an
exception that passes through Ray Data arrives without its cause."""

LEFT = -1
"""Stands for the shard's number in the report of one that was left for later, because of a pause."""

OUT_OF_REACH = (StorageError, ClusterError)
"""Errors that are no image's fault: the run stops."""

_OTHERS = 4
"""Images of other shards that are tried when all of one shard fail: if none works, the images are not to blame."""
_DETAIL = 200
"""Most characters of an error's text in a reason."""


class ShardLabeler:
    """Labels the shards it is given and writes each to its parquet file.

    `load` and `decode` may be replaced in a subclass: benchmarks have no network or no images, tests bad ones. What Ray
    hands to ``__init__`` is sealed; after that of this class there is ``self.task``.
    """

    def __init__(self, task: LabelTask | Sealed) -> None:
        self.task: LabelTask = task.open() if isinstance(task, Sealed) else task
        os.environ.update(self.task.environment)
        self.waiting = Waiting()
        self.pool = ThreadPoolExecutor(self.task.decode_threads, thread_name_prefix="decode")
        self._not_begun: MalError | None = None
        try:
            self._begin()
        except MalError as error:
            self._not_begun = error  # reported in place of the first shard

    def _begin(self) -> None:
        self.index = open_index(self.task.index_folder)
        self.predictor = self.load()
        self.images = self.source()
        try:
            self._try_network()
        except Exception as error:  # what is wrong with every image shows here
            raise MalError(f"the network does not run: {_in_short(error)}") from error

    def load(self) -> Predictor:
        """The network, on its device."""
        return load_predictor(self.task)

    def source(self) -> Images:
        """Where the images come from."""
        if self.task.decode_on_nodes:
            return OnNodes(type(self), self.task, self.task.decode_threads)
        return InThreads(self.pool, self.decode, self.task.decode_threads)

    @classmethod
    def decoder(cls, task: LabelTask) -> Decode:
        """`decode` for a process that has no network: of a labeler that knows its task and nothing else."""
        labeler = cls.__new__(cls)
        labeler.task = task
        return labeler.decode

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        """The image of an index row as RGB [H, W, 3]. Raises ImageError. It may use nothing but ``self.task``."""
        return decode_image(self.task, record)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch``: a column ``shard`` of shard numbers. Returns REPORT, one row per shard."""
        return pa.Table.from_pylist([self._report(shard) for shard in batch["shard"].to_pylist()], schema=REPORT)

    def _report(self, shard: int) -> dict[str, Any]:
        begun, waited = time.perf_counter(), self.waiting.seconds
        report = {"shard": LEFT, "boxes": 0, "rejected": 0, "actor": actor_name(), "error": None}
        try:
            if self._not_begun is not None:
                raise self._not_begun
            if not pause.asked(self.task.results_dir):
                report["boxes"], report["rejected"] = self.label(shard)
                report["shard"] = shard
        except MalError as error:
            report["error"] = pickle.dumps(error)
        return {**report, "seconds": time.perf_counter() - begun, "waited": self.waiting.seconds - waited}

    def label(self, shard: int) -> tuple[int, int]:
        """Label one shard, unless its file is there already.

        Returns:
            Its boxes, and how many of them were rejected.

        Raises:
            MalError: the run cannot go on.
        """
        path = self.task.shard_path(shard)
        if storage.exists(path):  # an earlier attempt wrote it and died before it could say so
            with storage.open_read(path) as file:
                labels = pq.read_table(file, columns=["reason"])
        else:
            account = Attempts.begin(self.task.attempts_path(shard), self.task.run)
            labels = self._label(shard, account)
            with storage.open_write(path) as file:
                pq.write_table(labels, file, compression="zstd")
            account.end()
        return labels.num_rows, labels.num_rows - labels["reason"].null_count

    def _label(self, shard: int, account: Attempts) -> pa.Table:
        """rows.LABELS of a shard, its images at once, or one by one where that goes wrong."""
        work = self.index.read_shard(shard)
        if not account.careful:
            try:
                return self._label_rows(work)
            except OUT_OF_REACH:
                raise
            except Exception as error:  # noqa: BLE001  whatever an image may cause
                self._check_network(error)
        labels, failures = self._label_one_by_one(work, account)
        if len(failures) == work.num_rows and not self._others_work(shard, account):
            message = f"labelling fails for every image, for the first with: {_in_short(failures[0])}"
            raise MalError(message) from failures[0]
        return labels

    def _label_one_by_one(self, work: pa.Table, account: Attempts) -> tuple[pa.Table, list[Exception]]:
        """rows.LABELS of a shard, and the errors of the images that failed."""
        poisoned = account.poisoned
        failures: list[Exception] = []

        def one(place: int) -> pa.Table:
            row = work.slice(place, 1)
            if place in poisoned:
                return rejected_rows(self.task, row, "crashed")
            try:
                return self._label_rows(row)
            except OUT_OF_REACH:
                raise
            except Exception as error:  # noqa: BLE001  whatever an image may cause
                self._check_network(error)
                failures.append(error)
                return rejected_rows(self.task, row, f"failed: {_in_short(error)}")

        tables = one_by_one(account, work.num_rows, one)
        return pa.concat_tables(tables).sort_by("position"), failures

    def _others_work(self, shard: int, account: Attempts) -> bool:
        """Whether the work of one image of a few of the other shards raises nothing, or there are no others."""
        if account.careful:  # processes died here: another image that kills would never be found
            return True
        step = max(1, self.index.shards // _OTHERS)
        others = [other for other in range(0, self.index.shards, step) if other != shard]
        for other in others:
            try:
                self._label_rows(self.index.read_shard(other).slice(0, 1))
            except OUT_OF_REACH:
                raise
            except Exception:  # noqa: BLE001  whatever an image may cause
                continue
            return True
        return not others

    def _label_rows(self, work: pa.Table) -> pa.Table:
        return label_rows(self.task, self.predictor, self.images, work, self.waiting)

    def _try_network(self) -> None:
        side = self.task.crop_size
        self.predictor.predict([BoxItem(np.zeros((side, side, 3), np.uint8), Box(0.0, 0.0, side / 2, side / 2))])

    def _check_network(self, error: Exception) -> None:
        """After ``error``: end this process if its network does not work any more."""
        try:
            self._try_network()
        except Exception as second:  # noqa: BLE001  nothing can be done with it here
            print(f"after {_in_short(error)} the network fails too: {_in_short(second)}", file=sys.stderr, flush=True)
            os._exit(1)


def _in_short(error: Exception) -> str:
    """One line for a ledger or a log."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_DETAIL].rstrip(": ")


def actor_name() -> str:
    """Ray's id of this actor; empty outside Ray."""
    import ray

    return ray.get_runtime_context().get_actor_id() or "" if ray.is_initialized() else ""


def _check_fingerprint(task: LabelTask) -> None:
    """Raises CheckpointError if the checkpoint is not the one that the run was begun with."""
    if file_fingerprint(task.checkpoint) == task.model_id:
        return
    if pretrained.is_built_in(task.checkpoint):
        raise CheckpointError(
            "this node's installation has another built-in model than the one that started the run; install the same "
            "version on all nodes, or give a checkpoint that every node reaches"
        )
    raise CheckpointError(
        f"{task.checkpoint} is no longer what it was when this run began: two models would be mixed. Put the old file "
        "back, or choose another results_dir; label with a file that training does not replace (model_epoch_NNN.pth)"
    )


def load_predictor(task: LabelTask) -> Predictor:
    """The predictor of a task: network built, weights loaded, on its device.

    Raises:
        CheckpointError: the checkpoint does not fit the spec's model.
    """
    if not task.use_gpu:
        torch.set_num_threads(task.threads)
    device = torch.device("cuda" if task.use_gpu else "cpu")
    checkpoint = read_checkpoint(task.checkpoint, task.encryption_key)
    _check_fingerprint(task)  # after it was read: what is replaced in between is noticed
    model = dataclasses.replace(task.model, pretrained=False)  # the weights come from the checkpoint

    def network(which: Literal["student", "teacher"]) -> MalNetwork:
        built = build_network(model, crop_size=task.crop_size, stem=checkpoint.stem)
        load_network(built, checkpoint, which=which, strict=model.strict)
        return built

    return Predictor(
        network("teacher" if task.use_teacher else "student"),
        mix_with=network("teacher") if task.use_mixed else None,
        crop_size=task.crop_size,
        mask_threshold=task.mask_thres,
        margin_rate=task.margin_rate,
        more_margins=task.more_margins,
        device=device,
        precision=compute_name(task.precision, device),
        flip=task.use_flip,
        crf=task.crf,
    )
