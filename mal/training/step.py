"""One optimiser step: student and teacher forward, losses, backward, AdamW, teacher update. No Ray, no data loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mal.model.losses import MeanFieldOptions, box_losses, warm_up
from mal.model.network import StudentTeacher
from mal.model.optimizer import build_optimizer
from mal.model.precision import training_type
from mal.model.schedule import floor_lr, learning_rate, peak_lr
from mal.spec.schema import Spec
from mal.training.strategy import spread

Batch = Mapping[str, Tensor]
"""``image``, ``teacher_image`` [B, 3, S, S] normalised; ``box_mask`` [B, S, S]; ``area`` [B] px^2."""


@dataclass(frozen=True)
class Moment:
    """When a step happens: everything in it that depends on time is a function of this."""

    epoch: int
    step: int
    """Optimiser steps done in this epoch."""
    steps_per_epoch: int


class Stepper:
    """The student-teacher pair of one worker with its optimiser.

    The learning rate follows ``workers``, those at hand: it is per box, and they all add boxes to a step.
    """

    def __init__(self, spec: Spec, model: StudentTeacher, device: torch.device, workers: int) -> None:
        train = spec.train
        self.spec, self.device = spec, device
        self.compute = training_type(train.use_amp, device)
        self.workers = workers
        self.strategy = spread(model, spec, device, self.compute)
        self.model = self.strategy.model
        self.peak = peak_lr(train.lr, workers, train.batch_size)
        self.floor = max(train.min_lr, floor_lr(self.peak, train.min_lr_rate))
        self.optimizer = build_optimizer(
            self.model.student,
            lr=self.peak,
            weight_decay=train.wd,
            betas=train.optim_betas,
            eps=train.optim_eps,
            decay_norms=train.decay_norms,
            kind=train.optim_type,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.compute == torch.float16)
        self.crf = MeanFieldOptions.of(train)

    def step(self, batches: Sequence[Batch], moment: Moment) -> Tensor:
        """One optimiser step over ``batches`` (more than one: accumulated gradients).

        Returns:
            [3]: total, MIL and CRF loss of this worker's boxes, on the device, not yet waited for.
        """
        self._seed(moment)
        rate = self.learning_rate(moment)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = torch.zeros(3, device=self.device)
        for place, batch in enumerate(batches):
            if place < len(batches) - 1:
                with self.strategy.local_gradients():
                    losses += self._backward(batch, moment, len(batches))
            else:
                losses += self._backward(batch, moment, len(batches))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.strategy.share_buffers()
        self.model.update_teacher(self.spec.model.teacher_momentum)
        return losses

    def learning_rate(self, moment: Moment) -> float:
        """The rate of this step; set before it (METHOD section 4)."""
        train = self.spec.train
        return learning_rate(
            moment.epoch + moment.step / moment.steps_per_epoch,
            peak=self.peak,
            floor=self.floor,
            warmup_epochs=train.warmup_epochs,
            num_epochs=train.num_epochs,
            num_wave=train.num_wave,
        )

    def _backward(self, batch: Batch, moment: Moment, parts: int) -> Tensor:
        """Losses of one batch and their gradients, each divided by ``parts``."""
        train = self.spec.train
        images = batch["image"].to(self.device, non_blocking=True)
        clean = batch["teacher_image"].to(self.device, non_blocking=True)
        box_mask = batch["box_mask"].to(self.device, non_blocking=True)
        areas = batch["area"]  # stays on the CPU: it decides which boxes share a pass
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            student = self.strategy.student(images, areas)
            teacher = self.strategy.teacher(clean, areas)
        losses = box_losses(
            student,
            teacher,
            images,
            box_mask,
            mil_weight=train.loss_mil_weight * warm_up(moment.epoch, moment.step, train.loss_mil_step),
            crf_weight=train.loss_crf_weight * warm_up(moment.epoch, moment.step, train.loss_crf_step),
            crf=self.crf,
        )
        self.scaler.scale(losses.total / parts).backward()
        return torch.stack([losses.total, losses.mil, losses.crf]).detach() / parts

    def _seed(self, moment: Moment) -> None:
        """What is random in a step (drop path) depends on seed, epoch, step and rank only: a resumed run repeats it."""
        if self.spec.train.seed >= 0 and self.spec.model.vit_dpr > 0:
            rank = dist.get_rank() if dist.is_initialized() else 0
            torch.manual_seed(hash((self.spec.train.seed, moment.epoch, moment.step, rank)))
