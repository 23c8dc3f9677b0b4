"""Which checkpoint training goes on from."""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_training import cut_blocks, make_batch, save_now, tiny_model

from mal import storage
from mal.encryption import MAGIC
from mal.errors import CheckpointError, WrongKeyError
from mal.model.safe_loading import load_pickle
from mal.training import checkpoints
from mal.training.checkpoints import TrainingState, progress, resume
from mal.training.saving import Saver
from mal.training.shards import FACTS
from mal.training.step import Moment, Stepper


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    cut_blocks(monkeypatch)


def _stepper(task):
    return Stepper(task.spec, tiny_model(task.spec), torch.device("cpu"), 1)


def _saved(task, epochs: int):
    """A stepper that has done a step and saved ``epochs`` checkpoints."""
    stepper = _stepper(task)
    for epoch in range(epochs):
        stepper.step([make_batch(epoch, 2)], Moment(1, epoch, 10))
        state = TrainingState(epoch=epoch + 1, global_step=10 * (epoch + 1), scores={"mIoU": 0.5})
        save_now(task, stepper, state)
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
    save_now(named, stepper, TrainingState(epoch=2, global_step=20))
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
        save_now(task, stepper, TrainingState(epoch=2))
    with pytest.raises(storage.StorageError, match="No space left"):
        save_now(task, stepper, TrainingState(epoch=1, offset=2, global_step=11))
    assert storage.read_bytes(task.latest) == old
    assert set(storage.list_files(task.folder)) == {"model_epoch_000.pth", "mal_model_latest.pth"}
    assert storage.list_folders(task.folder) == []
    assert progress(task) == (1, 0)


def test_the_saved_spec_holds_no_key(train_task):
    task = train_task()
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="hunter2"))
    _saved(task, 1)
    content = load_pickle(task.latest, "hunter2")
    assert content["format"] == checkpoints.FORMAT
    assert "hunter2" not in str(content["spec"])


@pytest.mark.parametrize("offset", [0, 2])
def test_encrypted_checkpoints_resume_with_their_key_alone(train_task, monkeypatch, offset):
    monkeypatch.delenv("MAL_ENCRYPTION_KEY", raising=False)
    task = train_task()
    locked = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="open sesame"))
    save_now(locked, _stepper(locked), TrainingState(epoch=1, offset=offset, global_step=7))
    files = [path for path in Path(task.folder).rglob("*") if path.is_file()]
    assert all(path.read_bytes().startswith(MAGIC) for path in files)
    assert len(files) == (3 if offset else 2)
    assert _resumed(locked)[1].offset == offset
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
        stepper.step([make_batch(step, 2)], Moment(1, step, 30))
        save_now(task, stepper, TrainingState(epoch=1, offset=2 * (step - 10), global_step=step))
    assert progress(task) == (1, 6)
    after, state = _resumed(task)
    assert (state.epoch, state.offset, state.global_step) == (1, 6, 13)
    batch, moment = make_batch(9, 2), Moment(1, 15, 30)
    assert stepper.step([batch], moment).tolist() == after.step([batch], moment).tolist()
    for p, q in zip(stepper.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q)
    names = ["model_epoch_001_step_00000012.dcp", "model_epoch_001_step_00000013.dcp"]
    assert storage.list_folders(task.folder) == names
    save_now(task, stepper, TrainingState(epoch=2, global_step=20))
    assert storage.list_folders(task.folder) == []
    assert progress(task) == (2, 0)


def _sharded(task, *steps: int):
    """A stepper that has saved shards after each of these steps, and their folders."""
    stepper = _stepper(task)
    for step in steps:
        stepper.step([make_batch(step, 2)], Moment(1, step, 30))
        save_now(task, stepper, TrainingState(epoch=1, offset=2 * step, global_step=step))
    return [task.shards_path(1, step) for step in steps]


def _cut(path: str) -> None:
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


@pytest.mark.parametrize("fault", ["cut", "absent", "changed", "metadata"])
def test_broken_shards_are_passed_over_with_a_warning(train_task, fault):
    task = train_task()
    _, newest = _sharded(task, 1, 2)
    data, metadata = f"{newest}/__0_0.distcp", f"{newest}/.metadata"
    if fault == "cut":
        _cut(data)
    elif fault == "absent":
        os.unlink(data)
    elif fault == "metadata":
        Path(metadata).write_bytes(b"x" * os.path.getsize(metadata))
    else:
        Path(data).write_bytes(b"x" * os.path.getsize(data))
    with pytest.warns(UserWarning, match="Going on from the checkpoint before it"):
        stepper, state = _resumed(task)
    assert state.global_step == 1
    storage.delete(newest)
    before, _ = _resumed(task)
    for p, q in zip(stepper.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_shards_of_a_step_are_not_written_again_over_the_only_copy(train_task, monkeypatch, whole, resumed):
    """Before and after validation, or when it is done again: who is killed in between would lose the epoch."""
    task = train_task()
    stepper = _stepper(task)
    monkeypatch.setattr(stepper.strategy, "sharded", True)  # an epoch's file is made from shards
    stepper.step([make_batch(1, 2)], Moment(0, 1, 30))
    saver = Saver(task)
    saver.save(stepper.strategy, stepper.optimizer, stepper.scaler, TrainingState(epoch=0, offset=9, global_step=20))
    saver.wait()
    if resumed:
        _, state = _resumed(task)
        saver = Saver(task, state.resumed_from)
    monkeypatch.setattr("mal.training.saving.write_shards", lambda *_: pytest.fail("written again"))
    state = TrainingState(epoch=1, global_step=20) if whole else TrainingState(epoch=0, offset=9, global_step=20)
    saver.save(stepper.strategy, stepper.optimizer, stepper.scaler, state)
    saver.wait()
    assert progress(task) == ((1, 0) if whole else (0, 9))
    after, _ = _resumed(task)
    for p, q in zip(stepper.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_after_going_back_the_new_line_keeps_its_checkpoints_and_the_old_ones_go(train_task):
    task = train_task()
    stepper = _stepper(task)
    for epoch, step in ((999, 31), (1000, 32)):  # in the order of numbers, not of names
        save_now(task, stepper, TrainingState(epoch=epoch, offset=2, global_step=step))
    assert len(storage.list_folders(task.folder)) == 2
    assert progress(task) == (1000, 2)
    save_now(task, stepper, TrainingState(epoch=1, offset=2, global_step=12))
    assert storage.list_folders(task.folder) == ["model_epoch_001_step_00000012.dcp"]
    assert progress(task) == (1, 2)


def test_without_the_right_key_nothing_older_is_gone_on_from(train_task, monkeypatch):
    """It would overwrite the epochs that the key opens."""
    monkeypatch.delenv("MAL_ENCRYPTION_KEY", raising=False)
    task = train_task()
    _saved(task, 1)
    locked = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="open sesame"))
    save_now(locked, _stepper(locked), TrainingState(epoch=2, global_step=20))
    wrong = dataclasses.replace(task, spec=dataclasses.replace(task.spec, encryption_key="open rye"))
    for other in (task, wrong):
        with pytest.raises(WrongKeyError):
            _resumed(other)
    assert _resumed(locked)[1].epoch == 2


def test_stages_that_were_frozen_cannot_be_trained_on(train_task):
    _saved(train_task("model.frozen_stages=[0,1]"), 1)
    with pytest.raises(CheckpointError, match=r"model.frozen_stages: \[1\] were frozen there"):
        _resumed(train_task("model.frozen_stages=[0]"))
    assert _resumed(train_task("model.frozen_stages=[0,1,2]"))[1].epoch == 1


def test_what_a_killed_run_left_half_written_is_deleted(train_task):
    task = train_task()
    kept, half = _sharded(task, 1, 2)
    os.unlink(f"{half}/{FACTS}")
    assert progress(task) == (1, 2)  # as if it were not there
    Path(task.folder, ".model_epoch_001.pth.1-x.part").touch()
    Saver(task)
    assert os.listdir(task.folder) == [os.path.basename(kept)]


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("place", ["metadata", "facts", "item"])
def test_shards_that_would_run_code_are_refused(train_task, tmp_path, place):
    task, target = train_task(), tmp_path / "pwned"
    (folder,) = _sharded(task, 1)
    if place == "metadata":
        Path(folder, ".metadata").write_bytes(pickle.dumps(Attack(target)))
    elif place == "facts":
        torch.save(Attack(target), Path(folder, FACTS))
    else:
        name = "model.student.backbone.cls_token"
        os.unlink(f"{folder}/.metadata")
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({name: Attack(target)}, checkpoint_id=folder, no_dist=True)
    files = {name: os.path.getsize(f"{folder}/{name}") for name in ("__0_0.distcp", ".metadata")}
    if place != "facts":
        facts = load_pickle(f"{folder}/{FACTS}")
        torch.save({**facts, "files": files}, f"{folder}/{FACTS}")
    with pytest.raises(CheckpointError, match=r"run code|not a tensor"):
        _resumed(task)
    assert not target.exists()


def test_saving_does_not_wait_for_the_disk_and_errors_come_up_later(train_task, monkeypatch):
    task = train_task()
    stepper, saver, go_on = _stepper(task), Saver(task), threading.Event()

    def stuck(*_: object) -> None:
        go_on.wait(30)
        raise storage.StorageError("the disk is gone")

    monkeypatch.setattr("mal.training.saving.write_shards", stuck)
    saver.save(stepper.strategy, stepper.optimizer, stepper.scaler, TrainingState(epoch=1, offset=2, global_step=1))
    stepper.step([make_batch(0, 2)], Moment(1, 0, 10))  # training goes on meanwhile
    go_on.set()
    with pytest.raises(storage.StorageError, match="the disk is gone"):
        saver.save(stepper.strategy, stepper.optimizer, stepper.scaler, TrainingState(epoch=2))
    saver.wait()


def test_the_thread_that_saves_leaves_the_filters_of_warnings_alone(train_task, monkeypatch):
    """They are the process's: what two threads set and restore at once, both lose (it failed a save in CI)."""
    task, before, same = train_task(), warnings.filters, []
    write = storage.open_write
    monkeypatch.setattr(storage, "open_write", lambda path: same.append(warnings.filters is before) or write(path))
    save_now(task, _stepper(task), TrainingState(epoch=0, offset=2, global_step=1))
    assert same
    assert all(same)


def test_hyperparameters_are_those_of_the_spec_at_hand(train_task):
    _saved(train_task(), 1)
    stepper, _ = _resumed(train_task("train.wd=0.25"))
    assert [group["weight_decay"] for group in stepper.optimizer.param_groups] == [0.25]


def test_checkpoints_that_all_cannot_be_read_stop_training(train_task):
    task = train_task()
    _saved(task, 1)
    for path in (task.latest, task.epoch_path(0)):
        storage.write_bytes(path, b"nothing of use")
    with pytest.raises(CheckpointError):
        progress(task)
