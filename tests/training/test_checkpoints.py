"""Which checkpoint training goes on from."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from tiny_training import make_batch, tiny_model

from mal import storage
from mal.errors import CheckpointError
from mal.model.safe_loading import load_pickle
from mal.training import checkpoints
from mal.training.checkpoints import TrainingState, progress, resume, save
from mal.training.step import Moment, Stepper


def _stepper(task):
    return Stepper(task.spec, tiny_model(task.spec), torch.device("cpu"), 1)


def _saved(task, epochs: int):
    """A stepper that has done a step and saved ``epochs`` checkpoints."""
    stepper = _stepper(task)
    for epoch in range(epochs):
        stepper.step([make_batch(epoch, 2)], Moment(1, epoch, 10))
        state = TrainingState(epoch=epoch + 1, global_step=10 * (epoch + 1), scores={"mIoU": 0.5})
        save(task, stepper.strategy, stepper.optimizer, stepper.scaler, state, rank=0)
    return stepper


def _resumed(task):
    stepper = _stepper(task)
    return stepper, resume(task, stepper.strategy, stepper.optimizer, stepper.scaler)


def test_everything_comes_back(train_task):
    task = train_task()
    before = _saved(task, 2)
    after, state = _resumed(task)
    assert (state.epoch, state.global_step, state.scores) == (2, 20, {"mIoU": 0.5})
    batch, moment = make_batch(9, 2), Moment(1, 5, 10)
    assert before.step([batch], moment).tolist() == after.step([batch], moment).tolist()
    for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_empty_folder_starts_from_the_beginning(train_task):
    _, state = _resumed(train_task())
    assert (state.epoch, state.global_step) == progress(train_task()) == (0, 0)


def test_a_half_written_latest_is_passed_over_with_a_warning(train_task):
    task = train_task()
    _saved(task, 3)
    for path in (task.latest, task.epoch_path(2)):
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
    with pytest.warns(UserWarning, match="Going on from the checkpoint before it"):
        _, state = _resumed(task)
    assert state.epoch == 2


def test_a_named_checkpoint_wins_but_its_own_descendants_go_on(train_task):
    plain = train_task()
    _saved(plain, 3)
    named = train_task(f"train.resume_training_checkpoint_path={plain.epoch_path(0)}")
    stepper, state = _resumed(named)
    assert state.epoch == 1
    save(named, stepper.strategy, stepper.optimizer, stepper.scaler, TrainingState(epoch=2, global_step=20), 0)
    _, again = _resumed(named)
    assert again.epoch == 2


def test_another_model_is_refused_but_other_training_keys_are_not(train_task):
    _saved(train_task(), 1)
    _, state = _resumed(train_task("train.num_epochs=50", "train.lr=1e-7", "model.teacher_momentum=0.9"))
    assert state.epoch == 1
    with pytest.raises(CheckpointError, match=r"mask_scale_ratio_pre: 1\.0 there, 2\.0 in the spec"):
        progress(train_task("model.mask_scale_ratio_pre=2"))


def test_weights_alone_are_no_training_checkpoint(train_task, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({"state_dict": {}}, path)
    task = train_task(f"train.resume_training_checkpoint_path={path}")
    with pytest.raises(CheckpointError, match=r"train\.pretrained_model_path"):
        progress(task)


def test_a_full_disk_leaves_the_checkpoint_before_intact(train_task, monkeypatch):
    task = train_task()
    stepper = _saved(task, 1)
    old = storage.read_bytes(task.latest)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match="No space left"):
        save(task, stepper.strategy, stepper.optimizer, stepper.scaler, TrainingState(epoch=2), 0)
    assert storage.read_bytes(task.latest) == old
    assert set(storage.list_files(task.folder)) == {"model_epoch_000.pth", "mal_model_latest.pth"}


def test_the_saved_spec_holds_no_key(train_task):
    task = train_task()
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="hunter2"))
    _saved(task, 1)
    content = load_pickle(task.latest, "hunter2")
    assert content["format"] == checkpoints.FORMAT
    assert "hunter2" not in str(content["spec"])


def test_encrypted_checkpoints_resume_with_their_key_alone(train_task, monkeypatch):
    monkeypatch.delenv("MAL_ENCRYPTION_KEY", raising=False)
    task = train_task()
    locked = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="open sesame"))
    _saved(locked, 1)
    assert b"student" not in storage.read_bytes(locked.latest)
    assert _resumed(locked)[1].epoch == 1
    wrong = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="open rye"))
    with pytest.raises(CheckpointError, match="the key is wrong"):
        progress(wrong)
    with pytest.raises(CheckpointError, match="MAL_ENCRYPTION_KEY"):
        progress(task)
    assert "sesame" not in repr(locked)


def test_checkpoints_within_an_epoch_are_gone_on_from_and_cleared_away(train_task):
    task = train_task()
    stepper = _saved(task, 1)
    for step in (11, 12, 13):
        state = TrainingState(epoch=1, offset=2 * (step - 10), global_step=step)
        save(task, stepper.strategy, stepper.optimizer, stepper.scaler, state, rank=0)
    assert progress(task) == (1, 6)
    kept = [name for name in storage.list_files(task.folder) if "step" in name]
    assert kept == ["model_step_00000012.pth", "model_step_00000013.pth"]
    for path in (task.latest, task.step_path(13)):
        storage.write_bytes(path, b"half")
    with pytest.warns(UserWarning, match="Going on from the checkpoint before it"):
        assert progress(task) == (1, 4)
    state = TrainingState(epoch=2, global_step=20)
    save(task, stepper.strategy, stepper.optimizer, stepper.scaler, state, rank=0)
    assert not [name for name in storage.list_files(task.folder) if "step" in name]
    assert progress(task) == (2, 0)


def test_checkpoints_that_all_cannot_be_read_stop_training(train_task):
    task = train_task()
    _saved(task, 1)
    for path in (task.latest, task.epoch_path(0)):
        storage.write_bytes(path, b"nothing of use")
    with pytest.raises(CheckpointError):
        progress(task)
