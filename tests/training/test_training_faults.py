"""Training whose workers or driver are killed: it goes on by itself or by the same command, to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_training import TINY

from mal.data.scenes import write_scenes

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line of ``mal train`` into a folder, with checkpoints every third step of 2 x 20."""
    folder = tmp_path_factory.mktemp("scenes")
    paths = write_scenes(str(folder), images=28, seed=4, size=(160, 120))
    (folder / "spec.yaml").write_text("{}\n")
    keys = [
        *TINY,
        f"dataset.train_ann_path={paths.annotations}",
        f"dataset.train_img_dir={paths.images}",
        "dataset.min_obj_size=100",
        "dataset.num_workers_per_gpu=0",
        "train.num_gpus=2",
        "train.num_epochs=2",
        "train.batch_size=4",
        "train.checkpoint_interval_unit=step",
        "train.checkpoint_interval=3",
    ]

    def make(results: Path) -> list[str]:
        own = [f"results_dir={results}", *keys]
        return [sys.executable, "-m", "mal.cli", "train", "-e", str(folder / "spec.yaml"), *own]

    return make


def _environment() -> dict[str, str]:
    own = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own


def _train(command: list[str], disturb=None) -> subprocess.CompletedProcess[str]:
    """Run to the end; ``disturb(process)`` once a checkpoint within an epoch is there."""
    folder = Path(next(a for a in command if a.startswith("results_dir=")).removeprefix("results_dir=")) / "train"
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    if disturb is not None:
        while process.poll() is None and not list(folder.glob("model_step_*.pth")):
            time.sleep(0.05)
        disturb(psutil.Process(process.pid))
    output = process.communicate(timeout=600)[0]
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def _weights(results: Path) -> dict[str, torch.Tensor]:
    return torch.load(results / "train" / "mal_model_latest.pth", weights_only=True)["state_dict"]


def _kill_one_worker(driver: psutil.Process) -> None:
    workers = [p for p in driver.children(recursive=True) if (p.cmdline() or [""])[0].startswith(WORKER)]
    assert len(workers) == 2, "no training workers to kill"
    workers[-1].send_signal(signal.SIGKILL)


def test_a_killed_worker_and_a_killed_driver_end_with_the_weights_of_an_undisturbed_run(command, tmp_path):
    plain = _train(command(tmp_path / "plain"))
    assert plain.returncode == 0, plain.stdout[-3000:]
    expected = _weights(tmp_path / "plain")

    healed = _train(command(tmp_path / "worker"), _kill_one_worker)
    assert healed.returncode == 0, healed.stdout[-3000:]
    killed = _train(command(tmp_path / "driver"), lambda driver: driver.send_signal(signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    again = _train(command(tmp_path / "driver"))
    assert again.returncode == 0, again.stdout[-3000:]
    for name in ("worker", "driver"):
        found = _weights(tmp_path / name)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{name}: {key}"
