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
    """The command line of ``mal train`` into a folder, with checkpoints in the middle of 4 epochs of 20 steps."""
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
        "train.num_epochs=4",
        "train.batch_size=4",
        "train.checkpoint_interval_unit=step",
        "train.checkpoint_interval=10",
    ]

    def make(results: Path, *more: str) -> list[str]:
        own = [f"results_dir={results}", *keys, *more]
        return [sys.executable, "-m", "mal.cli", "train", "-e", str(folder / "spec.yaml"), *own]

    return make


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory):
    """The weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("plain")
    plain = _train(command(folder))
    assert plain.returncode == 0, plain.stdout[-3000:]
    return _weights(folder)


def _environment() -> dict[str, str]:
    own = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own


def _train(command: list[str], disturb=None, when: str = "*.dcp/training.pth") -> subprocess.CompletedProcess[str]:
    """Run to the end; ``disturb(process)`` once a file like ``when`` is in the train folder."""
    folder = Path(next(a for a in command if a.startswith("results_dir=")).removeprefix("results_dir=")) / "train"
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    if disturb is not None:
        while process.poll() is None and not list(folder.glob(when)):
            time.sleep(0.05)
        disturb(psutil.Process(process.pid))
    output = process.communicate(timeout=600)[0]
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def _weights(results: Path) -> dict[str, torch.Tensor]:
    return torch.load(results / "train" / "mal_model_latest.pth", weights_only=True)["state_dict"]


def _check(results: Path, expected: dict[str, torch.Tensor]) -> None:
    found = _weights(results)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def _one_worker(driver: psutil.Process) -> psutil.Process:
    workers = [p for p in driver.children(recursive=True) if (p.cmdline() or [""])[0].startswith(WORKER)]
    assert len(workers) == 2, "no training workers"
    return workers[-1]


def _steps(results: Path) -> list[str]:
    return [path.name for path in (results / "train").glob("*.dcp")]


BY_EPOCH = ("train.checkpoint_interval_unit=epoch", "train.checkpoint_interval=100")
"""No checkpoint but the last: what is there before was saved because training was told to end."""
BEGUN = "events*"


def test_a_killed_worker_is_replaced(command, tmp_path, expected):
    healed = _train(command(tmp_path), lambda driver: _one_worker(driver).send_signal(signal.SIGKILL))
    assert healed.returncode == 0, healed.stdout[-3000:]
    _check(tmp_path, expected)


def test_a_killed_driver_is_followed_by_the_same_command(command, tmp_path, expected):
    killed = _train(command(tmp_path), lambda driver: driver.send_signal(signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    again = _train(command(tmp_path))
    assert again.returncode == 0, again.stdout[-3000:]
    _check(tmp_path, expected)


def test_a_driver_that_is_told_to_end_saves_and_is_followed_by_the_same_command(command, tmp_path, expected):
    line = command(tmp_path, *BY_EPOCH)
    ended = _train(line, lambda driver: driver.send_signal(signal.SIGTERM), BEGUN)
    assert ended.returncode == 3, ended.stdout[-3000:]
    assert len(_steps(tmp_path)) == 1
    assert not list((tmp_path / "train").glob("*.pth"))
    again = _train(line)
    assert again.returncode == 0, again.stdout[-3000:]
    _check(tmp_path, expected)


def test_a_worker_that_is_told_to_end_saves_and_is_replaced(command, tmp_path, expected):
    saved: list[str] = []

    def tell(driver: psutil.Process) -> None:
        _one_worker(driver).send_signal(signal.SIGTERM)
        while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE and not saved:
            saved.extend(_steps(tmp_path))
            time.sleep(0.02)

    healed = _train(command(tmp_path, *BY_EPOCH), tell, BEGUN)
    assert healed.returncode == 0, healed.stdout[-3000:]
    assert saved
    _check(tmp_path, expected)
