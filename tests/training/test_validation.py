"""Validation within training: every rank labels its part by itself, and training goes on as if nothing had been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_training import TINY, cut_blocks, run_ranks
from torch.distributed.tensor import DTensor

from mal.data.index import build_index, open_index
from mal.data.scenes import write_scenes
from mal.predictor import Predictor
from mal.spec.load import load_spec
from mal.training.preemption import Notice
from mal.training.task import TrainTask
from mal.training.worker import Worker

IMAGES = 5


@pytest.fixture
def scenes(tmp_path):
    """The images, and the indices for training and validation."""
    paths = write_scenes(str(tmp_path / "scenes"), images=IMAGES, seed=4, size=(160, 120))
    build_index(paths.annotations, str(tmp_path / "train_index"))
    build_index(paths.annotations, str(tmp_path / "val_index"), load_mask=True)
    return paths


def _worker(folder: Path, images: str, val_images: str, rank: int, workers: int, *overrides: str) -> Worker:
    data = [f"dataset.train_img_dir={images}", f"dataset.val_img_dir={val_images}", "dataset.min_obj_size=100"]
    spec = load_spec(None, [*TINY, *data, "dataset.num_workers_per_gpu=0", "train.num_epochs=2", *overrides])
    where = str(folder / "run"), str(folder / "train_index"), str(folder / "val_index")
    return Worker(TrainTask(spec, *where, workers, False), torch.device("cpu"), None, Notice(where[0], rank))


def _run(rank: int, workers: int, name: str, folder: Path, images: str, *overrides: str) -> None:
    """Two epochs with validation; writes the scores, the passes of every rank, and the weights at the end."""
    passes, answer = [], Predictor.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "answer", lambda self, crops: passes.append(1) or answer(self, crops))
        worker = _worker(folder, images, images, rank, workers, *overrides)
        scores = []
        for _ in range(2):
            worker.run_epoch()
            scores.append(worker.state.scores)
        worker.close()
    if worker.stepper.strategy.sharded:
        assert all(isinstance(p, DTensor) for p in worker.stepper.model.student.parameters())
    counts: list = [None] * workers
    dist.all_gather_object(counts, len(passes))
    if rank == 0:
        Path(folder, f"{name}.json").write_text(json.dumps({"scores": scores, "passes": counts}))
        shutil.move(f"{folder}/run", f"{folder}/{name}")
    dist.barrier()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_with_unequal_parts_validate_alike_under_every_strategy(scenes, tmp_path):
    """Under FSDP a forward pass that one rank alone does would wait for the others for ever."""
    offloaded = ("strategy=fsdp", "train.cpu_offload=true")
    run_ranks(
        2,
        (_run, "ddp", tmp_path, scenes.images, "strategy=ddp"),
        (_run, "fsdp", tmp_path, scenes.images, "strategy=fsdp"),
        (_run, "offloaded", tmp_path, scenes.images, *offloaded),
    )
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ddp", "fsdp", "offloaded")}
    weights = {
        name: torch.load(tmp_path / name / "mal_model_latest.pth", weights_only=True)["state_dict"] for name in found
    }
    first, second = found["ddp"]["passes"]
    assert first > second > 0
    for name in ("fsdp", "offloaded"):
        assert found[name]["passes"] == [first, second]
        for ours, theirs in zip(found[name]["scores"], found["ddp"]["scores"], strict=True):
            assert ours == pytest.approx(theirs, abs=0.02)
        for key, tensor in weights["ddp"].items():
            assert torch.allclose(weights[name][key], tensor, atol=1e-4), key


def test_an_image_that_cannot_be_read_costs_its_boxes_alone(scenes, tmp_path, monkeypatch):
    cut_blocks(monkeypatch)
    broken = shutil.copytree(scenes.images, tmp_path / "broken")
    first, *others = open_index(str(tmp_path / "val_index")).read_shard(0)["file_name"].to_pylist()
    Path(broken, first).write_bytes(b"not an image")
    shown = []
    monkeypatch.setattr("mal.training.events.EventLog.picture", lambda self, step, name, image: shown.append(image))
    worker = _worker(tmp_path, scenes.images, str(broken), 0, 1, "train.num_epochs=1")
    worker.run_epoch()
    worker.close()
    assert worker.state.scores["mIoU"] > 0
    assert len(shown) == 1
    assert others


def test_a_calibration_that_evaluation_has_yet_to_write_is_not_asked_for(scenes, tmp_path, monkeypatch):
    cut_blocks(monkeypatch)
    missing = f"evaluate.quality_path={tmp_path}/evaluate/quality.json"
    worker = _worker(tmp_path, scenes.images, scenes.images, 0, 1, "train.num_epochs=1", missing)
    worker.run_epoch()
    worker.close()
    assert worker.state.scores["mIoU"] > 0
