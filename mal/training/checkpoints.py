"""Writing and reading the state of training: one file that every strategy and number of workers can go on from.

The file is a dict that ``torch.load(weights_only=True)`` reads: ``state_dict`` with ``student.*`` and ``teacher.*``,
``optimizer``, ``scaler``, ``epoch`` (epochs done), ``offset`` (samples done in the next one), ``global_step``, ``spec``
(without secrets) and versions.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

import mal
from mal import storage
from mal.encryption import write_encrypted
from mal.errors import CheckpointError
from mal.model.weights import load_pickle
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec
from mal.training.strategy import Alone
from mal.training.task import TrainTask

FORMAT = "mal-training-1"
KEPT_WITHIN_EPOCH = 2
"""Checkpoints within the running epoch that are kept: the newest may be broken by what stopped training."""


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


def save(
    task: TrainTask,
    strategy: Alone,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    rank: int,
) -> str:
    """Write a checkpoint by its own name and as ``mal_model_latest.pth``; all ranks call it, the first one writes."""
    model_state, optimizer_state = strategy.model_state(), strategy.optimizer_state(optimizer)
    path = task.step_path(state.global_step) if state.offset else task.epoch_path(state.epoch - 1)
    if rank == 0:
        content = {
            "format": FORMAT,
            "state_dict": {name: tensor.contiguous() for name, tensor in model_state.items()},
            "optimizer": optimizer_state,
            "scaler": scaler.state_dict(),
            "epoch": state.epoch,
            "offset": state.offset,
            "global_step": state.global_step,
            "scores": state.scores,
            "resumed_from": task.spec.train.resume_training_checkpoint_path,
            "spec": spec_to_values(task.spec),
            "mal_version": mal.__version__,
            "torch_version": str(torch.__version__),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        for target in (path, task.latest):
            with storage.open_write(target) as file:
                if task.spec.encryption_key:
                    write_encrypted(file, buffer.getbuffer(), task.spec.encryption_key)
                else:
                    file.write(buffer.getbuffer())
        _delete_outdated(task, keep=KEPT_WITHIN_EPOCH if state.offset else 0)
    return path


def _delete_outdated(task: TrainTask, keep: int) -> None:
    """Delete the checkpoints within an epoch, but for the newest ``keep``."""
    within = [name for name in storage.list_files(task.folder) if name.startswith("model_step_")]
    for name in sorted(within)[: len(within) - keep]:
        storage.delete(storage.join(task.folder, name))


def resume(
    task: TrainTask, strategy: Alone, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Go on from the checkpoint that the spec names, else from the latest of the folder, else from the start.

    Raises:
        CheckpointError: it is no training checkpoint, or its model differs from the spec's.
    """
    found = _find(task)
    if found is None:
        return TrainingState()
    path, content = found
    _check_model(path, content["spec"], task.spec)
    strategy.load_model(content["state_dict"])
    strategy.load_optimizer(optimizer, content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return TrainingState(content["epoch"], content["offset"], content["global_step"], scores=dict(content["scores"]))


def _find(task: TrainTask) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint to go on from and its content; None to start from the beginning.

    One that the spec names wins over those of the folder, unless they descend from it: then the same command is being
    run again. A broken latest one is passed over, with a warning, for the one before it; if none is left that can be
    read, that is an error: training anew would overwrite them.
    """
    named = task.spec.train.resume_training_checkpoint_path
    broken: list[CheckpointError] = []
    for path in _own_checkpoints(task):
        try:
            content = _read(path, task.spec.encryption_key)
        except CheckpointError as error:
            broken.append(error)
            continue
        for fault in broken:
            warnings.warn(f"{fault}. Going on from the checkpoint before it", stacklevel=2)
        if named is None or content["resumed_from"] == named:
            return path, content
        break
    else:
        if broken and named is None:
            raise broken[0]
    return None if named is None else (named, _read(named, task.spec.encryption_key))


def _own_checkpoints(task: TrainTask) -> list[str]:
    """The folder's checkpoints, newest first."""
    names = [n for n in storage.list_files(task.folder) if n.startswith(("model_epoch_", "model_step_"))]
    latest = [task.latest] if storage.exists(task.latest) else []
    # Those within an epoch are deleted when an epoch's is written, so they are newer; and "step" sorts behind "epoch".
    return latest + [storage.join(task.folder, name) for name in sorted(names, reverse=True)]


def _read(path: str, key: str | None) -> dict[str, Any]:
    """The content of a training checkpoint, or CheckpointError."""
    content = load_pickle(path, key)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: this is no checkpoint of a training run; to start from its weights, set "
            "train.pretrained_model_path instead of train.resume_training_checkpoint_path"
        )
    return content


def _check_model(path: str, saved: dict[str, Any], spec: Spec) -> None:
    """Raise CheckpointError if the network of ``saved`` is another than that of ``spec``."""
    free = ("frozen_stages", "vit_dpr", "pretrained", "teacher_momentum", "strict")
    begun, now = saved["model"], spec_to_values(spec)["model"]
    differing = [f"model.{k}: {begun.get(k)!r} there, {now[k]!r} in the spec" for k in now if begun.get(k) != now[k]]
    differing = [text for text in differing if text.split(":")[0].removeprefix("model.") not in free]
    if differing:
        raise CheckpointError(
            f"{path} holds another model: {'; '.join(differing)}. Correct the spec, or choose a new results_dir"
        )


def progress(task: TrainTask) -> tuple[int, int]:
    """Epochs, and samples of the next one, that the checkpoint to go on from has behind it.

    Raises:
        CheckpointError: it is of another model.
    """
    found = _find(task)
    if found is None:
        return 0, 0
    path, content = found
    _check_model(path, content["spec"], task.spec)
    return int(content["epoch"]), int(content["offset"])
