"""The function that Ray Train runs in every worker: epochs of steps, checkpoints, validation.

All ranks make the same decisions at the same steps (they share the reduced losses), so none waits for another in vain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from mal import storage
from mal.data.augment import views
from mal.data.sampler import OffsetSampler
from mal.data.training_set import TrainingSet, load_training_boxes
from mal.errors import MalError, NonFiniteLossError, OutOfMemoryError
from mal.model.network import StudentTeacher, build_network
from mal.model.weights import load_pretrained, read_checkpoint
from mal.training import checkpoints, preemption
from mal.training.events import EventLog
from mal.training.journal import Journal
from mal.training.preemption import Agreement, Notice, Wish
from mal.training.saving import Saver
from mal.training.step import Batch, Moment, Stepper
from mal.training.task import TrainTask
from mal.training.validation import validate
from mal.training.waiting import Waiting


def train_worker(config: dict[str, Any]) -> None:
    """``config``: ``task`` (TrainTask) and ``board`` (handle of the Board actor, or None)."""
    task: TrainTask = config["task"]
    if storage.exists(task.fatal):
        return  # a worker was restarted for what no restart can mend; the driver reads the note
    try:
        with preemption.training():
            _train(task, config["board"])
    except NonFiniteLossError as error:
        _leave_note(task, error)  # all ranks are here: nobody waits for anybody, and none needs a restart
    except torch.OutOfMemoryError as error:
        _leave_note(task, _out_of_memory(task, error))
        raise
    except MalError as error:
        _leave_note(task, error)
        raise


def _leave_note(task: TrainTask, error: MalError) -> None:
    """Write down that no restart can mend this."""
    content = {"kind": type(error).__name__, "message": str(error)}
    storage.write_bytes(task.fatal, json.dumps(content).encode())


def _out_of_memory(task: TrainTask, error: Exception) -> OutOfMemoryError:
    spec = task.spec
    return OutOfMemoryError(
        f"the device ran out of memory with train.batch_size = {spec.train.batch_size} and dataset.crop_size = "
        f"{spec.dataset.crop_size}: lower one of them (train.accum_grad_batches makes up for a smaller batch), or set "
        f"train.activation_checkpointing=true, or with several workers strategy=fsdp. {error}"
    )


def _train(task: TrainTask, board: Any) -> None:
    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    rank = ray.train.get_context().get_world_rank()
    notice = Notice(task.folder, rank, drains=getattr(ray.train, "get_preemption_info", lambda: None))
    worker = Worker(task, _device(task), board, notice)
    try:
        while worker.state.epoch < task.spec.train.num_epochs and worker.wish < Wish.LEAVE:
            worker.run_epoch()
    finally:
        worker.close()
    if worker.wish == Wish.LEAVE:
        raise preemption.WorkerEndedError("a worker was told to end (SIGTERM); the state of training was saved")


def _device(task: TrainTask) -> torch.device:
    if not task.use_gpu:
        torch.set_num_threads(max(1, int(task.spec.train.cpus_per_worker)))
        return torch.device("cpu")
    import ray.train.torch

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.device(device)


@dataclass
class Worker:
    """One rank: its model, its data, and where training stands."""

    task: TrainTask
    device: torch.device
    board: Any
    notice: Notice
    wish: Wish = Wish.GO_ON
    """What all ranks agreed on last. From `Wish.LEAVE` on the state was saved, and no further step is done."""

    def __post_init__(self) -> None:
        spec = self.task.spec
        several = dist.is_initialized() and dist.get_world_size() > 1
        # The workers at hand: with elastic training fewer than the spec's, perhaps.
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        torch.manual_seed(self.task.seed)  # the same weights on every rank
        self.stepper = Stepper(spec, initial_model(self.task), self.device, self.workers)
        self.state = checkpoints.resume(self.task, self.stepper.strategy, self.stepper.optimizer, self.stepper.scaler)
        self.saver = Saver(self.task, self.state.resumed_from)
        self.agreement = Agreement(dist.new_group(backend="gloo") if several else None, self.rank)
        self.data = training_set(self.task)
        self.sampler = OffsetSampler(
            len(self.data),
            seed=self.task.seed,
            rank=self.rank,
            workers=self.workers,
            batch_size=spec.train.batch_size * spec.train.accum_grad_batches,
        )
        self.loader = self._loader()
        first = self.rank == 0
        self.events = EventLog(self.task.folder) if first and "tensorboard" in spec.train.loggers else None
        self.waiting = Waiting(self.device)
        self.journal = Journal(self.workers, self.waiting, self.events, self.board if first else None)

    @property
    def global_batch(self) -> int:
        train = self.task.spec.train
        return train.batch_size * train.accum_grad_batches * self.workers

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data) // self.global_batch)

    def run_epoch(self) -> None:
        """What is left of an epoch, then validation and checkpoint if they are due; less if training is to end."""
        epoch = self.state.epoch
        self.stepper.model.train()
        begun = self.journal.begin()
        for step, batches in self._batches():
            self.journal.add(self.stepper.step(batches, Moment(epoch, step, self.steps_per_epoch)))
            self.state.global_step += 1
            self.state.offset += self.global_batch
            self._after_step()
            if self.wish >= Wish.LEAVE and self.state.offset < len(self.data):
                return
        self._report()
        waiting_share = self.waiting.share(begun)
        train = self.task.spec.train
        last = epoch + 1 == train.num_epochs
        validated = self.task.val_index is not None and (last or (epoch + 1) % train.validation_interval == 0)
        if validated:
            self._save()  # validation can take long: whoever is killed in it has lost no step
            self.state.scores = validate(self.task, self.stepper, self.rank, self.events, self.state.global_step)
        self.state.epoch, self.state.offset = epoch + 1, 0
        by_step = train.checkpoint_interval_unit == "step"
        if last or by_step or self.wish > Wish.GO_ON or self.state.epoch % train.checkpoint_interval == 0:
            self._save()
        self._forget_saved()
        kpi = {"train_loss": self.state.loss, "waiting_share": waiting_share}
        kpi |= self.state.scores if validated else {}
        self.journal.tell_epoch(epoch + 1, train.num_epochs, self.state.global_step, kpi)

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """This rank's batches of what is left of the epoch, grouped by optimiser step, with the step's number in it."""
        self.sampler.set_position(self.state.epoch, self.state.offset)
        step = self.state.offset // self.global_batch
        group: list[Batch] = []
        for batch in self.waiting.over(self.loader):
            group.append(views(batch, self.device))
            if len(group) == self.task.spec.train.accum_grad_batches:
                yield step, group
                step, group = step + 1, []

    def _after_step(self) -> None:
        """Report and save, if it is time or training is to end. All ranks do the same."""
        train, step = self.task.spec.train, self.state.global_step
        wish = self.agreement.reach(self.notice.wish)
        if wish is not None:
            self.wish = wish
            self._report()
        by_step = train.checkpoint_interval_unit == "step" and step % train.checkpoint_interval == 0
        if self.state.offset >= len(self.data):
            return  # what is wished is done at the epoch's end
        if self.wish > Wish.GO_ON or by_step:
            self._report()  # a loss that is not finite must not be saved
            self._save()
        self._forget_saved()

    def _forget_saved(self) -> None:
        """A wish to save is fulfilled by one checkpoint; one to leave or pause stands."""
        self.wish = self.wish if self.wish >= Wish.LEAVE else Wish.GO_ON

    def _report(self) -> None:
        rate = self.stepper.optimizer.param_groups[0]["lr"]
        loss = self.journal.report(self.state.epoch, self.state.global_step, rate, self.global_batch)
        self.state.loss = self.state.loss if loss is None else loss

    def _save(self) -> None:
        s = self.stepper
        self.saver.save(s.strategy, s.optimizer, s.scaler, self.state)

    def _loader(self) -> DataLoader[Any]:
        """Decodes, crops and augments in processes of its own, which live as long as the worker."""
        spec = self.task.spec
        processes = spec.dataset.num_workers_per_gpu
        return DataLoader(
            self.data,
            batch_size=spec.train.batch_size,
            sampler=self.sampler,
            num_workers=processes,
            # Not "fork": the parent holds threads of Ray and perhaps connections to an object store.
            multiprocessing_context="forkserver" if processes else None,
            persistent_workers=processes > 0,
            prefetch_factor=4 if processes else None,
            pin_memory=self.device.type == "cuda",
        )

    def close(self) -> None:
        """Finish what is being saved. Raises what went wrong with it."""
        self.journal.close()
        self.saver.wait()


def training_set(task: TrainTask) -> TrainingSet:
    """The samples of all workers; each takes its part by the sampler."""
    spec = task.spec
    boxes = load_training_boxes(task.train_index, spec.dataset.min_obj_size, spec.dataset.max_obj_size)
    return TrainingSet(
        boxes,
        image_folder=storage.absolute(spec.dataset.train_img_dir or ""),
        crop_size=spec.dataset.crop_size,
        margin_rate=spec.train.margin_rate,
        seed=task.seed,
        max_image_pixels=spec.dataset.max_image_pixels,
        augmentation=spec.dataset.augmentation,
        margin_gate=spec.train.margin_gate,
    )


def initial_model(task: TrainTask) -> StudentTeacher:
    """Student and teacher before the first step: fresh, from timm's weights, or from a file of weights."""
    path, crop_size = task.spec.train.pretrained_model_path, task.spec.dataset.crop_size
    checkpoint = read_checkpoint(path, task.spec.encryption_key) if path else None
    stem = checkpoint.stem if checkpoint else "patch"
    model = StudentTeacher(build_network(task.spec.model, crop_size=crop_size, stem=stem))
    if checkpoint:
        print(f"{checkpoint}: {load_pretrained(model, checkpoint, strict=task.spec.model.strict)}", flush=True)
    return model
