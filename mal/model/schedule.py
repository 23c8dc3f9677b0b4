"""The learning rate as a function of the epoch (METHOD section 4). Plain arithmetic, no torch."""

from __future__ import annotations

import math


def peak_lr(lr: float, workers: int, batch_per_worker: int) -> float:
    """The highest rate: ``lr`` is per box, so it grows with the boxes per step of all workers on all nodes."""
    return lr * workers * batch_per_worker


def floor_lr(peak: float, min_lr_rate: float) -> float:
    """The rate at the end of the schedule: a part of the peak."""
    return peak * min_lr_rate


def learning_rate(
    epoch: float, *, peak: float, floor: float, warmup_epochs: float, num_epochs: float, num_wave: float = 1.0
) -> float:
    """The rate at a point of training: linear from 0 to ``peak``, then a cosine down to ``floor``.

    Set it *before* the optimiser's step, with ``epoch`` counted before it.

    Args:
        epoch: epochs done, with fraction: ``e + step / steps_per_epoch``.
        num_wave: half-waves of the cosine; 2 ends at the peak again.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if num_epochs <= warmup_epochs:
        return peak
    phase = math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs) * num_wave
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(phase))
