"""Every kind of checkpoint is recognised, and fits or is refused with its reason."""

from __future__ import annotations

import argparse
import collections
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from mal.architectures import ARCHITECTURES, Architecture
from mal.errors import CheckpointError
from mal.model.backbones import VitBackbone, build_backbone
from mal.model.network import MalNetwork, StudentTeacher
from mal.model.weights import (
    Checkpoint,
    identify_architecture,
    load_backbone,
    load_network,
    load_pretrained,
    read_checkpoint,
    recognise,
)

State = dict[str, Tensor]


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def pair(tiny_network: MalNetwork) -> StudentTeacher:
    pair = StudentTeacher(tiny_network)
    with torch.no_grad():
        for parameter in pair.teacher.parameters():
            parameter.mul_(0.5)
    return pair


@pytest.fixture
def fresh() -> StudentTeacher:
    torch.manual_seed(1)
    return StudentTeacher(MalNetwork(VitBackbone(Architecture("tiny", "vit", 16, 2, 2, 16)), hidden=8, out=8))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def with_classifier(state: State) -> State:
    heads = {
        f"{who}.backbone.head.{part}": torch.zeros(3) for who in ("student", "teacher") for part in ("weight", "bias")
    }
    return {**state, **heads}


def test_own_checkpoint(pair: StudentTeacher, fresh: StudentTeacher, tmp_path: Path) -> None:
    path = tmp_path / "model_epoch_000.pth"
    torch.save({"format": "mal-training-1", "state_dict": pair.state_dict(), "epoch": 3}, path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.kind == "mal"
    assert checkpoint.meta == {"format": "mal-training-1", "epoch": 3}
    report = load_pretrained(fresh, checkpoint)
    assert set(report.matched) == set(pair.student.state_dict())
    assert same(fresh, pair)
    load_network(fresh.student, checkpoint, which="teacher")
    assert same(fresh.student, pair.teacher)


@pytest.mark.parametrize("wrap", ["", "module.", "model.", "module._orig_mod."])
def test_peers_checkpoint_with_classifier(pair: StudentTeacher, fresh: StudentTeacher, wrap: str) -> None:
    state = {wrap + key: value for key, value in with_classifier(pair.state_dict()).items()}
    checkpoint = recognise(saved({"state_dict": state, "pytorch-lightning_version": "2"}), "peer.pth")
    assert checkpoint.kind == "peer"
    report = load_pretrained(fresh, checkpoint)
    assert report.ignored == ("backbone.head.weight", "backbone.head.bias")
    assert "ignored" in str(report)
    assert same(fresh, pair)


def test_network_alone_as_safetensors(pair: StudentTeacher, fresh: StudentTeacher) -> None:
    data = safetensors.torch.save(pair.student.state_dict())
    checkpoint = recognise(data, "student.safetensors")
    assert checkpoint.kind == "network"
    load_pretrained(fresh, checkpoint)
    assert same(fresh.student, pair.student)
    assert same(fresh.teacher, pair.student)
    load_network(fresh.student, checkpoint, which="teacher")


@pytest.mark.parametrize("nested", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_backbone(pair: StudentTeacher, fresh: StudentTeacher, nested: str | None, prefix: str) -> None:
    extra = {
        "mask_token": torch.zeros(1),
        "decoder_blocks.0.norm1.weight": torch.zeros(1),
        "head.weight": torch.zeros(1),
    }
    state = {prefix + key: value for key, value in {**pair.student.backbone.state_dict(), **extra}.items()}
    checkpoint = recognise(saved({nested: state} if nested else state), "mae.pth")
    assert checkpoint.kind == "backbone"
    report = load_pretrained(fresh, checkpoint)
    assert len(report.ignored) == 3
    assert same(fresh.student.backbone, pair.student.backbone)
    assert same(fresh.teacher, fresh.student)
    with pytest.raises(CheckpointError, match="only a backbone"):
        load_network(fresh.student, checkpoint)


@pytest.mark.parametrize(("grid", "extra"), [(24, 1), (14, 2), (16, 0)])
def test_position_embedding_of_another_grid(pair: StudentTeacher, grid: int, extra: int) -> None:
    backbone = pair.student.backbone
    y, x = torch.meshgrid(torch.linspace(-1, 1, grid), torch.linspace(-1, 1, grid), indexing="ij")
    plane = torch.stack([y.flatten(), x.flatten()] * 8, dim=1)[None]  # a plane stays one when it is resampled
    position = torch.cat((torch.ones(1, extra, 16), plane), dim=1)
    state = {**backbone.state_dict(), "pos_embed": position}
    report = load_backbone(backbone, recognise(saved(state), "x"))
    assert report.resampled == (("pos_embed",) if (grid, extra) != (14, 1) else ())
    assert backbone.pos_embed[0, 0].tolist() == [1.0 if extra else 0.0] * 16
    inner = backbone.pos_embed[0, 1:].view(14, 14, 16)[3:-3, 3:-3, 1]
    expected = torch.linspace(-1 + 1 / 14, 1 - 1 / 14, 14)[3:-3] * (grid / (grid - 1) if grid != 14 else 14 / 13)
    torch.testing.assert_close(inner, expected.expand_as(inner), atol=0.02, rtol=0)


def test_timm_weights_fit(tmp_path: Path) -> None:
    source = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    path = tmp_path / "deit.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.architecture == "vit-deit-tiny/16"
    backbone = build_backbone("vit-deit-tiny/16")
    report = load_backbone(backbone, checkpoint)
    assert set(report.ignored) == {"head.weight", "head.bias"}
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = source.eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(backbone.eval()(images).flatten(2).transpose(1, 2), tokens)


def test_wrong_architecture_is_named() -> None:
    with torch.device("meta"):
        small = build_backbone("vit-deit-small/16")
    checkpoint = recognise(saved({key: torch.zeros(value.shape) for key, value in small.state_dict().items()}), "a.pth")
    message = (
        r"a\.pth: holds vit-deit-small/16, but the spec's model is vit-deit-tiny/16; set model\.arch=vit-deit-small/16"
    )
    with pytest.raises(CheckpointError, match=message):
        load_backbone(build_backbone("vit-deit-tiny/16"), checkpoint)


def test_missing_unexpected_and_misshaped_names(pair: StudentTeacher, fresh: StudentTeacher) -> None:
    state = pair.student.state_dict()
    del state["roi_head.mlp1.bias"]
    state["roi_head.mlp3.bias"] = torch.zeros(1)
    state["mask_head.convs.0.conv.bias"] = torch.zeros(5)
    checkpoint = recognise(saved(state), "x.pth")
    match = (
        r"lacks roi_head\.mlp1\.bias; the model has no roi_head\.mlp3\.bias; other shapes: .*convs\.0\.conv\.bias \[5\]"
    )
    with pytest.raises(CheckpointError, match=match):
        load_network(fresh.student, checkpoint)
    before = fresh.student.roi_head.mlp1.bias.clone()
    report = load_network(fresh.student, checkpoint, strict=False)
    assert set(report.missing) == {"roi_head.mlp1.bias", "mask_head.convs.0.conv.bias"}
    assert set(report.unexpected) == {"roi_head.mlp3.bias", "mask_head.convs.0.conv.bias"}
    assert torch.equal(fresh.student.roi_head.mlp1.bias, before)
    assert torch.equal(fresh.student.roi_head.mlp2.bias, pair.student.roi_head.mlp2.bias)


def test_nothing_in_common(fresh: StudentTeacher) -> None:
    with pytest.raises(CheckpointError, match="none of its 1 tensors"):
        load_network(fresh.student, recognise(saved({"roi_head.x": torch.zeros(1)}), "x"), strict=False)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [torch.zeros(1)], torch.zeros(1), {"state_dict": {"a": 1}}])
def test_no_weights(content: Any) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        recognise(saved(content), "x.pth")


def test_research_weights_need_the_convolutional_stem() -> None:
    architecture = ARCHITECTURES["vit-deit-tiny/16"]
    student = MalNetwork(VitBackbone(architecture, stem="conv"))
    checkpoint = recognise(saved({"state_dict": StudentTeacher(student).state_dict()}), "old.ckpt")
    assert (checkpoint.kind, checkpoint.stem, checkpoint.architecture) == ("peer", "conv", "vit-deit-tiny/16")
    with pytest.raises(CheckpointError, match="convolutional stem"):
        load_network(MalNetwork(VitBackbone(architecture)), checkpoint)
    network = MalNetwork(VitBackbone(architecture, stem=checkpoint.stem))
    load_network(network, checkpoint)
    assert same(network, student)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.family == "vit"])
def test_architecture_is_seen_from_the_shapes(name: str) -> None:
    with torch.device("meta"):
        assert identify_architecture(build_backbone(name).state_dict()) == name


@pytest.mark.shared
def test_peers_weights_are_recognised(reference) -> None:
    checkpoint = read_checkpoint(str(reference.folder / "model_vit_tiny.pt"))
    assert (checkpoint.kind, checkpoint.architecture) == ("network", "vit-deit-tiny/16")
    report = load_network(MalNetwork(build_backbone("vit-deit-tiny/16")), checkpoint)
    assert len(report.matched) == 162


def test_a_released_research_checkpoint_as_lightning_wrote_it() -> None:
    """Convolutional stem, student and teacher, and everything that lay about in the trainer when it was saved."""
    student = MalNetwork(VitBackbone(Architecture("vit-deit-tiny/16", "vit", 192, 3, 12, 16), stem="conv"), out=8)
    content = {
        "epoch": 9,
        "global_step": 14999,
        "pytorch-lightning_version": "1.6.5",
        "state_dict": StudentTeacher(student).state_dict(),
        "hyper_parameters": {"args": argparse.Namespace(lr=1e-6, crop_size=512, margin_rate=[0, 1.2])},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": np.float32(0.5), "best": Path("x")}},
        "loops": {"fit_loop": {"ious": np.zeros((3, 2), np.float64), "seen": np.arange(3, dtype=np.int32)}},
        "lr_schedulers": [collections.defaultdict(list, {"rates": [np.float64(1e-6)]})],
        "done": np.bool_(True),
    }
    checkpoint = recognise(saved(content), "released.ckpt")
    assert (checkpoint.kind, checkpoint.stem, checkpoint.architecture) == ("peer", "conv", "vit-deit-tiny/16")
    assert checkpoint.meta["epoch"] == 9
    network = MalNetwork(VitBackbone(ARCHITECTURES["vit-deit-tiny/16"], stem=checkpoint.stem), out=8)
    report = load_network(network, checkpoint, which="teacher")
    assert len(report.matched) == len(student.state_dict())
    assert same(network, student)


@pytest.mark.shared
@pytest.mark.parametrize(("file", "stem"), [("orig", "conv"), ("tao", "patch")])
def test_names_and_shapes_of_both_peers_fit(reference, file: str, stem: Any) -> None:
    listed = json.loads((reference.folder / f"keys_{file}_vit-mae-base-16.json").read_text())["keys"]
    state = {key: torch.zeros(shape, device="meta") for key, shape in listed.items()}
    checkpoint = Checkpoint("peer", "peer", *(_part(state, which) for which in ("student.", "teacher.")))
    assert (checkpoint.architecture, checkpoint.stem) == ("vit-mae-base/16", stem)
    with torch.device("meta"):
        network = MalNetwork(VitBackbone(ARCHITECTURES["vit-mae-base/16"], stem=checkpoint.stem))
    for which in ("student", "teacher"):
        report = load_network(network, checkpoint, which=which)
        assert len(report.matched) == len(network.state_dict())
        assert set(report.ignored) <= {"backbone.head.weight", "backbone.head.bias"}


def _part(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
