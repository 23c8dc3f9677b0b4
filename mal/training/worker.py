"""The function that Ray Train runs in every worker: epochs of steps, checkpoints, validation.

All ranks make the same decisions at the same steps (they share the reduced losses), so none waits for another in vain.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from mal import storage
from mal.data.augment import views
from mal.data.sampler import OffsetSampler
from mal.data.training_set import TrainingSet, load_training_boxes
from mal.errors import MalError, NonFiniteLossError, OutOfMemoryError
from mal.model.network import StudentTeacher, build_network
from mal.model.weights import load_pretrained, read_checkpoint
from mal.run import pause
from mal.training import checkpoints
from mal.training.events import EventLog
from mal.training.step import Batch, Moment, Stepper
from mal.training.task import TrainTask
from mal.training.validation import validate
from mal.training.waiting import Waiting

REPORT_SECONDS = 2.0
"""The losses are read and shared by all workers this often; between, no step waits for the device."""


def train_worker(config: dict[str, Any]) -> None:
    """``config``: ``task`` (TrainTask) and ``board`` (handle of the Board actor, or None)."""
    task: TrainTask = config["task"]
    if storage.exists(task.fatal):
        return  # a worker was restarted for what no restart can mend; the driver reads the note
    try:
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
        f"{spec.dataset.crop_size}: lower one of them (train.accum_grad_batches makes up for a smaller batch). {error}"
    )


def _train(task: TrainTask, board: Any) -> None:
    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    rank = ray.train.get_context().get_world_rank()
    worker = Worker(task, rank, _device(task), board)
    while worker.state.epoch < task.spec.train.num_epochs and not worker.paused:
        worker.run_epoch()
    worker.close()


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
    rank: int
    device: torch.device
    board: Any
    paused: bool = False
    """Asked to pause: the state was saved, and no further step is done."""
    _pending: list[Tensor] = field(default_factory=list)
    _last_report: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        spec = self.task.spec
        torch.manual_seed(self.task.seed)  # the same weights on every rank
        model = initial_model(self.task)
        self.stepper = Stepper(spec, model, self.device, self.task.workers)
        self.state = checkpoints.resume(self.task, self.stepper.strategy, self.stepper.optimizer, self.stepper.scaler)
        self.data = training_set(self.task)
        self.sampler = OffsetSampler(
            len(self.data),
            seed=self.task.seed,
            rank=self.rank,
            workers=self.task.workers,
            batch_size=spec.train.batch_size * spec.train.accum_grad_batches,
        )
        self.loader = self._loader()
        self.waiting = Waiting(self.device)
        self._reported = self.waiting.mark()
        shown = self.rank == 0 and "tensorboard" in spec.train.loggers
        self.events = EventLog(self.task.folder) if shown else None

    @property
    def global_batch(self) -> int:
        train = self.task.spec.train
        return train.batch_size * train.accum_grad_batches * self.task.workers

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data) // self.global_batch)

    def run_epoch(self) -> None:
        """What is left of an epoch, then checkpoint and validation if they are due; less if a pause is asked for."""
        epoch = self.state.epoch
        self.stepper.model.train()
        begun = self._reported = self.waiting.mark()
        for step, batches in self._batches():
            self._pending.append(self.stepper.step(batches, Moment(epoch, step, self.steps_per_epoch)))
            self.state.global_step += 1
            self.state.offset += self.global_batch
            if self._after_step() and self.state.offset < len(self.data):
                return
        self._share_losses()
        waiting_share = self.waiting.share(begun)
        self.state.epoch, self.state.offset = epoch + 1, 0
        train = self.task.spec.train
        last = self.state.epoch == train.num_epochs
        validated = self.task.val_index is not None and (last or self.state.epoch % train.validation_interval == 0)
        if validated:
            self.state.scores = validate(self.task, self.stepper, self.rank, self.events, self.state.global_step)
        by_epoch = train.checkpoint_interval_unit == "epoch"
        if last or self.paused or (by_epoch and self.state.epoch % train.checkpoint_interval == 0):
            self._save()
        self._note_epoch(epoch, {"waiting_share": waiting_share, **(self.state.scores if validated else {})})

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

    def _after_step(self) -> bool:
        """Report, save or pause, if it is time; returns whether training is to pause. All ranks do the same."""
        train, step = self.task.spec.train, self.state.global_step
        if self._report_is_due():
            self._share_losses()
            self.paused = self._pause_asked()
        by_step = train.checkpoint_interval_unit == "step" and step % train.checkpoint_interval == 0
        if (self.paused or by_step) and self.state.offset < len(self.data):
            self._share_losses()  # a loss that is not finite must not be saved
            self._save()
        return self.paused

    def _save(self) -> None:
        s = self.stepper
        checkpoints.save(self.task, s.strategy, s.optimizer, s.scaler, self.state, self.rank)

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

    def _pause_asked(self) -> bool:
        """Whether the run was asked to pause; the first rank looks, so that all agree."""
        asked = torch.tensor([self.rank == 0 and pause.asked(self.task.folder)], dtype=torch.int32, device=self.device)
        if self.task.workers > 1:
            dist.broadcast(asked, src=0)
        return bool(asked.item())

    def _report_is_due(self) -> bool:
        """Whether to share the losses now; decided by the first rank's clock, so that all agree."""
        due = torch.tensor([time.monotonic() - self._last_report > REPORT_SECONDS], dtype=torch.int32)
        if self.task.workers > 1 and len(self._pending) % 8:
            return False
        if self.task.workers > 1:
            due = due.to(self.device)
            dist.broadcast(due, src=0)
        return bool(due.item())

    def _share_losses(self) -> None:
        """Average the losses of the steps since the last time over all ranks, check and record them.

        Raises:
            NonFiniteLossError: on every rank alike, naming the step.
        """
        if not self._pending:
            return
        losses = torch.stack(self._pending)
        if self.task.workers > 1:
            dist.all_reduce(losses)
            losses /= self.task.workers
        values = losses.cpu()
        first = self.state.global_step - len(values)
        bad = (~torch.isfinite(values).all(dim=1)).nonzero()
        if len(bad):
            step = first + int(bad[0])
            raise NonFiniteLossError(
                f"the loss of step {step} (epoch {self.state.epoch}) is {values[bad[0]][0][0]:g}: training stopped, "
                "checkpoints before it are intact. Lower train.lr, or set train.use_amp=false"
            )
        self._pending, self._last_report = [], time.monotonic()
        self.state.loss = float(values[:, 0].mean())
        rate = self.stepper.optimizer.param_groups[0]["lr"]
        if self.events is not None:
            self.events.losses(first, values, rate)
            self.events.waiting(self.state.global_step, self.waiting.share(self._reported))
        steps = {"first_step": first, "losses": values.tolist(), "rate": rate}
        boxes, waiting = len(values) * self.global_batch, self.waiting.share(self._reported)
        self._note({"kind": "steps", "boxes": boxes, "loss": self.state.loss, "waiting": waiting, **steps})
        self._reported = self.waiting.mark()

    def _note_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        kpi = {"train_loss": self.state.loss, **figures}
        told = ", ".join(f"{name} {value:.4f}" for name, value in kpi.items())
        message = f"epoch {epoch + 1} of {self.task.spec.train.num_epochs} done: {told}"
        self._note({"kind": "epoch", "message": message, "kpi": kpi, "step": self.state.global_step})

    def _note(self, note: dict[str, Any]) -> None:
        if self.rank == 0 and self.board is not None:
            import ray

            ray.get(self.board.write.remote(note))

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


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
