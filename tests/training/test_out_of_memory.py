"""A device that runs out of memory: the run ends at once, and says what to lower."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from ray import cloudpickle
from tiny_training import TINY

from mal.data.scenes import write_scenes
from mal.errors import OutOfMemoryError
from mal.spec.load import load_spec
from mal.training import launch


def short_of_memory(config) -> None:
    """As `train_worker`, on a device that has too little memory."""
    from mal.training.step import Stepper
    from mal.training.worker import train_worker

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    Stepper.step = step
    train_worker(config)


@pytest.mark.ray
@pytest.mark.slow
def test_status_names_batch_and_crop_size_and_what_to_lower(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train_worker", short_of_memory)
    paths = write_scenes(str(tmp_path / "scenes"), images=3, seed=4, size=(160, 120))
    data = [f"dataset.train_ann_path={paths.annotations}", f"dataset.train_img_dir={paths.images}"]
    more = ["dataset.min_obj_size=100", "dataset.num_workers_per_gpu=0", f"results_dir={tmp_path}"]
    spec = load_spec(None, [*TINY, *data, *more])
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        with pytest.raises(OutOfMemoryError):
            launch.run_training(spec)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    last = json.loads((tmp_path / "train" / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE"
    for part in (
        "train.batch_size = 2",
        "dataset.crop_size = 32",
        "lower",
        "train.activation_checkpointing",
        "2.00 GiB",
    ):
        assert part in last["message"]
