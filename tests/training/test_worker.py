"""The epochs of one worker, without Ray: what is interrupted goes on as if it had not been."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_training import TINY, cut_blocks

from mal.data.index import build_index
from mal.data.scenes import write_scenes
from mal.errors import NonFiniteLossError
from mal.run import pause
from mal.spec.load import load_spec
from mal.training.journal import Journal
from mal.training.preemption import Notice, Wish
from mal.training.task import TrainTask
from mal.training.worker import Worker


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    cut_blocks(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    paths = write_scenes(str(folder), images=5, seed=4, size=(160, 120))
    build_index(paths.annotations, str(folder / "index"))
    return paths, str(folder / "index")


@pytest.fixture
def make_worker(scenes, tmp_path):
    paths, index = scenes

    def make(folder: str, *overrides: str) -> Worker:
        data = [f"dataset.train_img_dir={paths.images}", "dataset.min_obj_size=100", "dataset.num_workers_per_gpu=0"]
        spec = load_spec(None, [*TINY, *data, "train.num_epochs=2", "train.batch_size=4", *overrides])
        task = TrainTask(spec, str(tmp_path / folder), index, None, 1, False)
        return Worker(task, torch.device("cpu"), None, Notice(task.folder, 0))

    return make


def _finish(worker: Worker) -> dict[str, torch.Tensor]:
    while worker.state.epoch < 2 and worker.wish < Wish.LEAVE:
        worker.run_epoch()
    worker.close()
    return worker.stepper.model.state_dict()


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_a_run_killed_within_an_epoch_ends_with_the_same_weights(make_worker, monkeypatch):
    by_step = ["train.checkpoint_interval_unit=step", "train.checkpoint_interval=2"]
    whole = _finish(make_worker("whole", *by_step))
    first = make_worker("killed", *by_step)
    steps = first.steps_per_epoch
    assert steps >= 5
    calls = []
    step = first.stepper.step

    def until_killed(*arguments):
        calls.append(1)
        if len(calls) == steps + 4:
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(first.stepper, "step", until_killed)
    with pytest.raises(Killed):
        _finish(first)
    first.saver.wait()  # what it was writing is not part of this test
    again = make_worker("killed", *by_step)
    assert (again.state.epoch, again.state.offset) == (1, 4 * (3 if steps % 2 else 2))
    for name, tensor in _finish(again).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_run_killed_in_validation_has_lost_no_step(make_worker, monkeypatch):
    """Not even where checkpoints are due more seldom than validation."""
    seldom = ["train.checkpoint_interval=2", "train.validation_interval=1"]
    whole = _finish(make_worker("whole", *seldom))

    def validated(folder: str, validate) -> Worker:
        monkeypatch.setattr("mal.training.worker.validate", validate)
        worker = make_worker(folder, *seldom)
        worker.task = dataclasses.replace(worker.task, val_index="an index")
        return worker

    def killed(*_):
        raise Killed

    first = validated("killed", killed)
    with pytest.raises(Killed):
        _finish(first)
    first.saver.wait()
    again = validated("killed", lambda *_: {"mIoU": 0.5})
    assert (again.state.epoch, again.state.global_step) == (0, again.steps_per_epoch)
    assert again.state.loss == first.state.loss
    taken, step = [], again.stepper.step
    monkeypatch.setattr(again.stepper, "step", lambda *arguments: taken.append(1) or step(*arguments))
    for name, tensor in _finish(again).items():
        assert torch.equal(tensor, whole[name]), name
    assert len(taken) == again.steps_per_epoch  # of the second epoch alone
    assert again.state.scores == {"mIoU": 0.5}


def test_a_pause_saves_within_the_epoch_and_the_rest_is_done_later(make_worker):
    whole = _finish(make_worker("whole"))
    worker = make_worker("paused")
    pause.ask(worker.task.folder)
    _finish(worker)
    assert worker.wish == Wish.PAUSE
    assert (worker.state.epoch, worker.state.global_step) == (0, 1)
    pause.forget_earlier(worker.task.folder)
    again = make_worker("paused")
    assert again.state.offset == 4
    for name, tensor in _finish(again).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_wish_to_save_after_the_last_step_of_an_epoch_is_fulfilled_once(make_worker, monkeypatch):
    worker = make_worker("drained", "train.checkpoint_interval=2")
    last = worker.steps_per_epoch
    monkeypatch.setattr(
        worker.agreement, "reach", lambda wish: Wish.SAVE if worker.state.global_step == last else Wish.GO_ON
    )
    saved, save = [], worker.saver.save
    monkeypatch.setattr(worker.saver, "save", lambda *a: saved.append(worker.state.global_step) or save(*a))
    worker.run_epoch()
    assert saved == [last]
    assert worker.wish == Wish.GO_ON
    _finish(worker)
    assert saved == [last, 2 * last]


def test_what_is_left_of_an_epoch_is_what_was_not_done(make_worker):
    worker = make_worker("run")
    everything = [i for _, group in worker._batches() for batch in group for i in batch["id"].tolist()]
    worker.state.offset = 8
    left = [i for _, group in worker._batches() for batch in group for i in batch["id"].tolist()]
    worker.close()
    assert left == everything[8:]
    assert len(set(everything)) == len(worker.data)


def test_the_share_of_time_spent_waiting_is_reported(make_worker, monkeypatch):
    monkeypatch.setattr("mal.training.preemption.AGREE_SECONDS", 0.0)  # after every step
    notes = []
    monkeypatch.setattr(Journal, "tell", lambda self, note: notes.append(note))
    worker = make_worker("waiting")
    worker.run_epoch()
    worker.close()
    shares = [note["waiting"] for note in notes if note["kind"] == "steps"]
    assert len(shares) == worker.steps_per_epoch
    assert all(0 < share < 1 for share in shares)  # without processes of its own, the loader is waited for
    (epoch,) = [note for note in notes if note["kind"] == "epoch"]
    assert 0 < epoch["kpi"]["waiting_share"] < 1
    assert "waiting_share 0." in epoch["message"]


def test_a_loss_that_is_not_finite_stops_training_naming_the_step(make_worker, monkeypatch):
    worker = make_worker("nan")
    step = worker.stepper.step

    def broken(batches, moment):
        loss = step(batches, moment)
        return loss * float("nan") if moment.step == 3 else loss

    monkeypatch.setattr(worker.stepper, "step", broken)
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 3 \(epoch 0\) is nan"):
        _finish(worker)
    worker.close()
