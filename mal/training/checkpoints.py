"""Reading the state of training, and which of the checkpoints at hand to go on from.

There are two kinds (`mal.training.saving` writes them). The file ``model_epoch_NNN.pth`` is a dict that
``torch.load(weights_only=True)`` reads: ``state_dict`` with ``student.*`` and ``teacher.*``, ``optimizer``, and the
*facts*: ``epoch`` (epochs done), ``offset`` (samples done in the next one), ``global_step``, ``scaler``, ``spec``
(without secrets) and versions. The folder ``model_epoch_NNN_step_SSSSSSSS.dcp`` holds the same in shards. Both go on
under every strategy and with any number of workers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mal import storage
from mal.errors import CheckpointError, MalError, WrongKeyError
from mal.model.weights import load_pickle
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec
from mal.training.shards import FACTS, load_shards, read_facts
from mal.training.strategy import Alone
from mal.training.task import TrainTask

T = TypeVar("T")
FORMAT = "mal-training-1"
SHARDED = re.compile(r"model_epoch_(\d+)_step_(\d+)\.dcp")
WHOLE = re.compile(r"model_epoch_(\d+)\.pth")


@dataclass
class TrainingState:
    """Where training stands."""

    epoch: int = 0
    """Epochs done."""
    offset: int = 0
    """Samples of the next epoch that all workers together have done."""
    global_step: int = 0
    """Optimiser steps done."""
    loss: float = math.nan
    """Mean loss of the last steps."""
    scores: dict[str, float] = field(default_factory=dict)
    """Figures of the last validation."""
    resumed_from: str | None = None
    """The checkpoint that all this was read from."""


def resume(
    task: TrainTask, strategy: Alone, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Go on from the checkpoint that `_go_on` finds, or start. A call of all ranks together; the first one reads files.

    Raises:
        CheckpointError: as `_go_on`.
    """
    key = task.spec.encryption_key
    tensors: dict[str, Any] = {"state_dict": {}, "optimizer": {}}

    def read(path: str) -> dict[str, Any]:
        def in_parts() -> dict[str, Any]:
            content = read_content(path, key)
            tensors.update({name: content.pop(name) for name in tensors if name in content})
            return content

        return _agreed(in_parts, strategy)

    def load(path: str) -> None:
        if is_sharded(path):
            state = strategy.state(optimizer)
            load_shards(path, state, key, dist.group.WORLD if strategy.workers > 1 else None)
            strategy.load_optimizer(optimizer, state)
        else:
            strategy.load_full(optimizer, tensors["state_dict"], tensors["optimizer"])

    found = _go_on(task, _agreed(lambda: _candidates(task), strategy), read, load)
    if found is None:
        return TrainingState()
    path, facts = found
    scaler.load_state_dict(facts["scaler"])
    done = facts["epoch"], facts["offset"], facts["global_step"]
    return TrainingState(*done, facts.get("loss", math.nan), dict(facts["scores"]), path)


def progress(task: TrainTask) -> tuple[int, int]:
    """Epochs, and samples of the next one, that the checkpoint to go on from has behind it.

    Raises:
        CheckpointError: as `_go_on`.
    """
    key = task.spec.encryption_key
    found = _go_on(task, _candidates(task), lambda path: read_content(path, key), lambda path: None)
    return (int(found[1]["epoch"]), int(found[1]["offset"])) if found else (0, 0)


def _go_on(
    task: TrainTask,
    paths: Sequence[str],
    read: Callable[[str], dict[str, Any]],
    load: Callable[[str], None],
) -> tuple[str, dict[str, Any]] | None:
    """Load the checkpoint to go on from and return its path and facts; None to start from the beginning.

    One that the spec names wins over those of the folder, unless they descend from it: then the same command is being
    run again. A broken newest one is passed over, with a warning, for the one before it; if none is left that can be
    read, that is an error: training anew would overwrite them.

    Raises:
        WrongKeyError: of the newest one that is not broken.
        CheckpointError: it is no training checkpoint, or its model differs from the spec's.
    """
    named = task.spec.train.resume_training_checkpoint_path
    broken: list[CheckpointError] = []
    for path in paths:
        try:
            facts = read(path)
            if named not in (None, path, facts["resumed_from"]):
                continue
            different = _difference(facts["spec"], task.spec)
            if not different:
                load(path)
        except WrongKeyError:
            raise  # going on from one before it would overwrite what the right key opens
        except CheckpointError as error:
            broken.append(error)
            continue
        for fault in broken:
            warnings.warn(f"{fault}. Going on from the checkpoint before it", stacklevel=3)
        if different:
            raise CheckpointError(
                f"{path} holds another model: {different}. Correct the spec, or choose a new results_dir"
            )
        return path, facts
    if broken:
        raise broken[0] if named is None else broken[-1]
    return None


def _candidates(task: TrainTask) -> list[str]:
    """The checkpoints of the folder, the one that came furthest first, then the one that the spec names."""
    whole = [match for name in storage.list_files(task.folder) if (match := WHOLE.fullmatch(name))]
    sharded = [match for name in storage.list_folders(task.folder) if (match := SHARDED.fullmatch(name))]
    found: list[tuple[float, int, str]] = [(int(match[1]) + 1, 0, match[0]) for match in whole]
    found += [
        (int(match[1]), int(match[2]), match[0])
        for match in sharded
        if storage.exists(storage.join(task.folder, match[0], FACTS))  # else writing it was stopped, and it is none
    ]
    if storage.exists(task.latest):
        # The newest file once more, or all that is left of it.
        newest = max((int(match[1]) + 1 for match in whole), default=math.inf)
        found.append((newest, 0, storage.name(task.latest)))
    paths = [storage.join(task.folder, name) for *_, name in sorted(found, reverse=True)]
    named = task.spec.train.resume_training_checkpoint_path
    return paths if named is None else [*paths, named]


def is_sharded(path: str) -> bool:
    """Whether this is the path of a sharded checkpoint."""
    return storage.name(path).endswith(".dcp")


def read_content(path: str, key: str | None) -> dict[str, Any]:
    """What is in a training checkpoint; of a sharded one the facts alone.

    Raises:
        CheckpointError: it is broken, or none.
    """
    content = read_facts(path, key) if is_sharded(path) else load_pickle(path, key)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: this is no checkpoint of a training run; to start from its weights, set "
            "train.pretrained_model_path instead of train.resume_training_checkpoint_path"
        )
    return content


def _agreed(work: Callable[[], T], strategy: Alone) -> T:
    """What ``work`` returns or raises on the first rank, the same on all."""
    if strategy.workers == 1:
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except MalError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])


def _difference(saved: dict[str, Any], spec: Spec) -> str:
    """How the network of ``saved`` differs from that of ``spec``; empty if it does not."""
    free = ("frozen_stages", "vit_dpr", "pretrained", "teacher_momentum", "strict")
    begun, now = saved["model"], spec_to_values(spec)["model"]
    keys = [key for key in now if key not in free and begun.get(key) != now[key]]
    different = [f"model.{key}: {begun.get(key)!r} there, {now[key]!r} in the spec" for key in keys]
    thawed = sorted({stage for stage in begun["frozen_stages"] if stage >= 0} - {*now["frozen_stages"]})
    if thawed:
        different.append(
            f"model.frozen_stages: {thawed} were frozen there, so it holds nothing of the optimiser for them (to train "
            "them from its weights: train.pretrained_model_path)"
        )
    return "; ".join(different)
