"""Two workers with DDP, two with FSDP2, and one with the double batch learn the same."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_training import make_batch, tiny_model, tiny_spec

from mal.training import checkpoints
from mal.training.step import Moment, Stepper
from mal.training.task import TrainTask

STEPS = 20


def _run(rank: int, workers: int, strategy: str, folder: str, port: int, resume: bool) -> None:
    """``STEPS`` steps as rank of ``workers`` on a common batch of 4, split over the workers; writes the mean losses."""
    torch.set_num_threads(1)
    if workers > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    spec = tiny_spec(f"strategy={strategy}", f"train.batch_size={4 // workers}")
    stepper = Stepper(spec, tiny_model(spec), torch.device("cpu"), workers)
    task = TrainTask(spec, f"{folder}/train", "", None, workers, False)
    if resume:
        state = checkpoints.resume(task, stepper.strategy, stepper.optimizer, stepper.scaler)
        assert state.global_step == STEPS
    losses = []
    for step in range(STEPS):
        # What each worker sees holds the same number of boxes, so the mean of means is the mean.
        batch = {k: v[rank::workers] for k, v in make_batch(step, 4).items()}
        loss = stepper.step([batch], Moment(1, step, STEPS))
        if workers > 1:
            dist.all_reduce(loss)
        losses.append((loss / workers).tolist())
    state = checkpoints.TrainingState(epoch=1, global_step=STEPS)
    if not resume:
        checkpoints.save(task, stepper.strategy, stepper.optimizer, stepper.scaler, state, rank)
    if rank == 0:
        Path(folder, f"losses-{strategy}-{workers}-{resume}.json").write_text(json.dumps(losses))
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _losses(folder: Path, strategy: str, workers: int, resume: bool = False) -> torch.Tensor:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if workers == 1:
        _run(0, 1, strategy, str(folder), port, resume)
    else:
        mp.start_processes(
            _run, (workers, strategy, str(folder), port, resume), nprocs=workers, start_method="forkserver"
        )
    return torch.tensor(json.loads((folder / f"losses-{strategy}-{workers}-{resume}.json").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ddp_fsdp_and_one_worker_agree_and_resume_from_each_other(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "ddp", "fsdp")}
    for folder in folders.values():
        folder.mkdir()
    one = _losses(folders["one"], "ddp", 1)
    ddp = _losses(folders["ddp"], "ddp", 2)
    fsdp = _losses(folders["fsdp"], "fsdp", 2)
    # MIL divides by n + 1e-4: 2 boxes a worker against 4 differ by 2.5e-5 relative.
    assert torch.allclose(ddp[:, 0], one[:, 0], rtol=1e-4)
    assert torch.allclose(fsdp[:, 0], ddp[:, 0], rtol=1e-4)

    states = {
        name: torch.load(folder / "train" / "mal_model_latest.pth", weights_only=True)
        for name, folder in folders.items()
    }
    assert set(states["fsdp"]["state_dict"]) == set(states["one"]["state_dict"])
    for name, tensor in states["ddp"]["state_dict"].items():
        assert torch.allclose(states["fsdp"]["state_dict"][name], tensor, atol=1e-5), name

    # A checkpoint of two sharded workers goes on with one, and one of one worker with two sharded ones.
    on_one = _losses(folders["fsdp"], "ddp", 1, resume=True)
    on_two = _losses(folders["one"], "fsdp", 2, resume=True)
    assert torch.allclose(on_one[:, 0], on_two[:, 0], rtol=2e-4)
