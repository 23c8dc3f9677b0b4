"""The specs that come with the project."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mal.model.network import build_network
from mal.spec.checks import _contradictions, _model
from mal.spec.derived import train_workers
from mal.spec.load import load_spec

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configs():
    wanted = {"coco_8gpu", "cpu_smoke", "label", "small_data_1gpu", "vit_huge_fsdp", "vit_large_fsdp"}
    assert wanted <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_loads_and_fits_its_model(path):
    spec = load_spec(str(path))
    assert _contradictions(spec) + _model(spec) == []
    with torch.device("meta"):
        network = build_network(dataclasses.replace(spec.model, pretrained=False), crop_size=spec.dataset.crop_size)
    assert spec.dataset.crop_size % network.backbone.stride == 0


def test_workers_of_all_nodes_count():
    spec = load_spec(str(CONFIGS[0].with_name("vit_huge_fsdp.yaml")))
    assert train_workers(spec) == 16
    assert spec.train.min_workers == 8


@pytest.mark.parametrize("name", ["vit_huge_fsdp", "vit_large_fsdp"])
def test_large_models_are_sharded_and_keep_little_for_the_backward_pass(name):
    spec = load_spec(str(CONFIGS[0].with_name(f"{name}.yaml")))
    assert spec.strategy == "fsdp"
    assert spec.train.activation_checkpointing
