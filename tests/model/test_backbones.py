"""Backbones by name, freezing, the convolutional stem."""

from __future__ import annotations

import json

import pytest
import torch

from mal.architectures import ARCHITECTURES, Architecture
from mal.errors import SpecError
from mal.model.backbones import VitBackbone, build_backbone, freeze
from mal.model.network import MalNetwork, StudentTeacher

TINY = Architecture("tiny", "vit", 16, 2, 3, 16)


def test_unknown_name() -> None:
    with pytest.raises(SpecError, match="not an architecture"):
        build_backbone("resnet")


def test_vit_features_are_the_patch_tokens_in_order() -> None:
    """The mean of a patch of one colour must land at the patch's place."""
    backbone = VitBackbone(TINY).eval()
    with torch.no_grad():
        backbone.pos_embed.zero_()
        image = torch.zeros(1, 3, 48, 32)
        image[:, :, 16:32, 16:] = 1.0  # row 1, column 1 of 3 x 2 patches
        features = backbone(image)
    assert features.shape == (1, 16, 3, 2)
    distances = (features - features[:, :, :1, :1]).norm(dim=1)[0]
    assert (distances > 1e-3).nonzero().tolist() == [[1, 1]]


def test_drop_path_grows_with_depth() -> None:
    backbone = VitBackbone(TINY, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_freeze_stages() -> None:
    backbone = VitBackbone(TINY, drop_path=0.2)
    names = set(backbone.state_dict())
    freeze(backbone, [0, 2])
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"} <= frozen
    assert not any(name.startswith(("blocks.0.", "blocks.2.", "norm.")) for name in frozen)
    backbone.train()
    assert [block.training for block in backbone.blocks] == [True, False, True]
    assert set(backbone.state_dict()) == names


def test_freeze_nothing_and_too_much() -> None:
    backbone = VitBackbone(TINY)
    freeze(backbone, [-1])
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(SpecError, match=r"model\.frozen_stages: \[4\]"):
        freeze(backbone, [1, 4])


def test_conv_stem_runs_at_other_sizes() -> None:
    backbone = VitBackbone(TINY, stem="conv")
    for side in (32, 224):
        features = backbone(torch.randn(1, 3, side, side))
        assert features.shape == (1, 16, side // 16, side // 16)
    features.sum().backward()
    assert backbone.patch_embed.proj[0][0].weight.grad is not None


def test_conv_stem_needs_patches_of_16() -> None:
    with pytest.raises(SpecError, match="no convolutional stem"):
        build_backbone("vit-mae-huge/14", stem="conv")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["vit-deit-tiny/16", "vit-mae-base/16"])
def test_conv_stem_has_the_research_codes_names(reference, name: str) -> None:
    file = reference.folder / f"keys_legacy_backbone_{name.replace('/', '-')}.json"
    prefix = "student.backbone."
    expected = {key.removeprefix(prefix): shape for key, shape in json.loads(file.read_text())["keys"].items()}
    with torch.device("meta"):
        backbone = build_backbone(name, stem="conv")
    assert {key: list(value.shape) for key, value in backbone.state_dict().items()} == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_forward_and_backward(name: str) -> None:
    """Shapes only, on the meta device: the huge one has 632 million parameters."""
    with torch.device("meta"):
        backbone = build_backbone(name, drop_path=0.1)
        side = 4 * backbone.stride
        features = backbone(torch.empty(2, 3, side, side))
        assert features.shape == (2, ARCHITECTURES[name].width, 4, 4)
        features.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if architecture.width > 768 else [])
        for name, architecture in ARCHITECTURES.items()
        if architecture.width < 1280
    ],
)
def test_every_architecture_takes_a_training_step(name: str) -> None:
    """All but the huge one, with real numbers."""
    torch.manual_seed(0)
    pair = StudentTeacher(MalNetwork(build_backbone(name), hidden=16, out=16))
    images, areas = torch.randn(2, 3, 64, 64), torch.tensor([500.0, 20000.0])
    pair.student(images, areas).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in pair.student.parameters() if p.requires_grad)
    torch.optim.SGD(pair.student.parameters(), lr=1e-3).step()
    before = pair.teacher(images, areas)
    pair.update_teacher(0.5)
    assert not torch.equal(pair.teacher(images, areas), before)
