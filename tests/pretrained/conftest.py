"""A built-in model made for the tests: small, with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from mal import pretrained, quality
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec

SETTINGS = {
    "model.arch": "vit-deit-tiny/16",
    "model.mask_head_hidden_channel": 8,
    "model.mask_head_out_channel": 8,
    "dataset.crop_size": 32,
    "train.mask_thres": [0.5],
    "train.test_margin_rate": [0.4, 0.4],
    "inference.use_flip_test": True,
    "inference.test_margins": [0.8],
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with all that belongs to a built-in model."""
    folder = tmp_path_factory.mktemp("built-in")
    torch.manual_seed(0)
    model = load_spec(None, [f"{key}={value}" for key, value in SETTINGS.items()]).model
    weights = StudentTeacher(build_network(model, crop_size=32)).state_dict()
    safetensors.torch.save_file({k: v.clone() for k, v in weights.items()}, folder / "default.safetensors")
    described = {"name": "tiny", "settings": SETTINGS, "figures": {"box_mean_iou": 0.7, "mIoU": 0.65, "spearman": 0.5}}
    (folder / "default.json").write_text(json.dumps(described))
    rng = np.random.default_rng(0)
    evidence = rng.uniform(0, 1, (60, len(quality.Evidence._fields)))
    calibration = quality.fit(evidence, rng.uniform(0.3, 0.6, 60)).to_json()
    (folder / "quality.json").write_text(json.dumps({"boxes": 60, "calibration": calibration}))
    (folder / "CARD.md").write_text("# tiny\n")
    return folder


@pytest.fixture
def built_in(files, monkeypatch):
    """This process has the built-in model of the tests."""
    monkeypatch.setattr(pretrained, "FOLDER", files)
    return files
