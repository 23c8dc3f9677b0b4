"""A tiny model and batches to train it on."""

from __future__ import annotations

import dataclasses
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mal import architectures
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec
from mal.training.saving import Saver

TINY = [
    "dataset.crop_size=32",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "train.crf_num_iter=3",
    "train.use_amp=false",
    "train.loss_mil_step=0",
    "train.loss_crf_step=0",
    "train.warmup_epochs=0",
    "train.batch_size=2",
    "train.lr=1e-4",
]


def tiny_spec(*overrides: str):
    """The spec of a model that takes a tenth of a second a step."""
    return load_spec(None, [*TINY, *overrides])


def cut_blocks(monkeypatch, blocks: int = 2) -> None:
    """Leave the tiny models so many blocks: steps are short then, and checkpoints small."""
    for name in ("vit-deit-tiny/16", "fan_tiny_12_p16_224"):
        cut = dataclasses.replace(architectures.ARCHITECTURES[name], depth=blocks)
        monkeypatch.setitem(architectures.ARCHITECTURES, name, cut)


def tiny_model(spec) -> StudentTeacher:
    torch.manual_seed(0)
    return StudentTeacher(build_network(spec.model, crop_size=spec.dataset.crop_size))


def save_now(task, stepper, state) -> None:
    """A checkpoint, written when this returns."""
    saver = Saver(task)
    saver.save(stepper.strategy, stepper.optimizer, stepper.scaler, state)
    saver.wait()


def make_batch(seed: int, size: int) -> dict[str, torch.Tensor]:
    """``size`` random crops with a box in the middle, of small, medium and large boxes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    box_mask = torch.zeros(size, 32, 32)
    box_mask[:, 6:27, 4:25] = 1.0
    areas = torch.tensor([500.0, 4000.0, 50000.0, 4000.0])[torch.arange(size) % 4].double()
    return {"image": images, "teacher_image": images + 0.1, "box_mask": box_mask, "area": areas}


def run_ranks(workers: int, *jobs: tuple) -> None:
    """Do ``jobs`` on ``workers`` ranks: functions and their arguments; they are called with rank and workers first."""
    if workers == 1:
        _rank(0, 1, 0, list(jobs))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (workers, port, list(jobs)), nprocs=workers, start_method="forkserver")


def _rank(rank: int, workers: int, port: int, jobs: list[tuple]) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cut_blocks(patch)
        if workers > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("gloo", rank=rank, world_size=workers)
        for do, *arguments in jobs:
            do(rank, workers, *arguments)
        if workers > 1:
            dist.barrier()
            dist.destroy_process_group()
