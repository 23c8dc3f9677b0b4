"""Saving the state of training while it goes on: what is to be saved is copied, and written by a thread.

An epoch is saved as one file, a moment within it as shards (`mal.training.checkpoints` says how they look). Under FSDP
no rank gathers what it does not write: an epoch, too, is written in shards first, and the first rank makes the file
from them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mal
from mal import storage
from mal.encryption import sealed
from mal.spec.load import spec_to_values
from mal.training.checkpoints import FORMAT, SHARDED, TrainingState, is_sharded
from mal.training.shards import FACTS, read_whole, write_shards
from mal.training.strategy import MODEL, Alone, optimizer_slots
from mal.training.task import TrainTask

KEPT_WITHIN_EPOCH = 2
"""Sharded checkpoints that are kept: the newest may be broken by what stopped training."""


class Saver:
    """Writes one checkpoint at a time. All ranks make one, and call it alike."""

    def __init__(self, task: TrainTask, resumed_from: str | None = None) -> None:
        """``resumed_from``: the checkpoint that training goes on from, if any."""
        self.task = task
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        # Its own group, as two threads must not mix their messages; on the CPU, as the device is busy.
        self._group = dist.new_group(backend="gloo") if several else None
        self._writing: Future[None] | None = None
        self._shards = resumed_from if resumed_from and is_sharded(resumed_from) else None
        if self.rank == 0:
            delete_half_written(task)

    def save(
        self,
        strategy: Alone,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        state: TrainingState,
    ) -> None:
        """Begin to save; returns when a copy is made, or when the save before it is done, if that takes longer.

        A checkpoint is there in full or, to whoever looks for one, not at all.

        Raises:
            StorageError: of this save or the one before it; on every rank that wrote.
        """
        self.wait()
        sharded = strategy.sharded or state.offset > 0
        facts = {
            "format": FORMAT,
            "scaler": scaler.state_dict(),
            "epoch": state.epoch,
            "offset": state.offset,
            "global_step": state.global_step,
            "loss": state.loss,
            "scores": dict(state.scores),
            "resumed_from": self.task.spec.train.resume_training_checkpoint_path,
            "spec": spec_to_values(self.task.spec),
            "param_groups": _parameter_groups(strategy, optimizer),
            "mal_version": mal.__version__,
            "torch_version": str(torch.__version__),
        }
        tensors: dict[str, Tensor] = {}
        if sharded or self.rank == 0:
            tensors = {n: t.detach().contiguous().to("cpu", copy=True) for n, t in strategy.state(optimizer).items()}
        self._writing = Future()
        thread = threading.Thread(target=self._run, args=(tensors, facts, sharded), name="checkpoint", daemon=True)
        thread.start()

    def wait(self) -> None:
        """Wait until what was begun is written. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _run(self, tensors: dict[str, Tensor], facts: dict[str, Any], sharded: bool) -> None:
        assert self._writing is not None
        writing = self._writing
        try:
            self._write(tensors, facts, sharded)
        except BaseException as error:  # noqa: BLE001 - the thread's outermost frame: `wait` raises it
            writing.set_exception(error)
        else:
            writing.set_result(None)

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, Any], sharded: bool) -> None:
        task, key = self.task, self.task.spec.encryption_key
        whole = not facts["offset"]
        folder = task.shards_path(facts["epoch"] - whole, facts["global_step"])
        # The step says what is in the shards: those of this step are not written again, they may be the only copy.
        if sharded and folder != self._shards:
            write_shards(folder, tensors, facts, key, self._group, self.rank)
        self._shards = folder if sharded and not whole else None
        if self.rank == 0:
            if whole:
                _write_file(task, read_whole(folder, key) if sharded else tensors, facts)
            _delete_outdated(task, None if whole else folder)


def _parameter_groups(strategy: Alone, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimiser's groups with parameters by name, as torch's state dicts have them."""
    names = {id(parameter): name for name, parameter in strategy.model.student.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def _write_file(task: TrainTask, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The one file of an epoch, and its copy ``mal_model_latest.pth``."""
    content = {
        **{name: value for name, value in facts.items() if name != "param_groups"},
        "state_dict": {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)},
        "optimizer": {"state": optimizer_slots(tensors), "param_groups": facts["param_groups"]},
    }
    path = task.epoch_path(facts["epoch"] - 1)
    with storage.open_write(path) as file, sealed(file, task.spec.encryption_key) as clear:
        torch.save(content, clear)
    storage.copy(path, task.latest)


def _delete_outdated(task: TrainTask, newest: str | None) -> None:
    """Delete the sharded checkpoints but for ``newest``, which was written just now, and those just before it.

    Those that came further are of a line that was given up for an earlier checkpoint.
    """
    found = [match for name in storage.list_folders(task.folder) if (match := SHARDED.fullmatch(name))]
    names = [match[0] for match in sorted(found, key=lambda match: (int(match[1]), int(match[2])))]
    end = names.index(storage.name(newest)) + 1 if newest else 0
    for name in {*names}.difference(names[max(end - KEPT_WITHIN_EPOCH, 0) : end]):
        storage.delete(storage.join(task.folder, name))


def delete_half_written(task: TrainTask) -> None:
    """Delete what a killed run has left half written. Only when nobody writes there any more."""
    storage.delete_leftovers(task.folder)
    for name in storage.list_folders(task.folder):
        folder = storage.join(task.folder, name)
        if SHARDED.fullmatch(name) and not storage.exists(storage.join(folder, FACTS)):
            storage.delete(folder)
