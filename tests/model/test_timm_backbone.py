"""Backbones of timm by its feature interface."""

from __future__ import annotations

import io

import pytest
import timm
import torch

from mal.errors import SpecError
from mal.model.backbones import build_backbone, freeze
from mal.model.network import MalNetwork
from mal.model.weights import load_backbone, recognise

FAMILIES = {
    "vit_tiny_patch16_224": (192, 16),
    "vit_small_patch14_reg4_dinov2": (384, 14),
    "vit_small_patch16_dinov3": (384, 16),
    "eva02_tiny_patch14_224": (192, 14),
    "hiera_tiny_224": (384, 16),
    "sam2_hiera_tiny": (384, 16),
    "convnext_atto": (160, 16),
    "convnextv2_atto": (160, 16),
    "swin_tiny_patch4_window7_224": (384, 16),
    "resnet18": (256, 16),
    "efficientnet_b0": (112, 16),
    "mobilenetv4_conv_small": (96, 16),
    "pvt_v2_b0": (160, 16),
    "fastvit_t8": (192, 16),
    "xcit_nano_12_p16_224": (128, 16),
    "mambaout_femto": (192, 16),
}
"""timm name -> width and stride of the map."""


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains(name: str) -> None:
    width, stride = FAMILIES[name]
    side = 4 * stride
    backbone = build_backbone(f"timm/{name}", crop_size=side)
    assert (backbone.width, backbone.stride) == (width, stride)
    network = MalNetwork(backbone, hidden=4, out=4)
    logits = network(torch.randn(2, 3, side, side), torch.tensor([100.0, 5000.0]))
    assert logits.shape == (2, 16, 16)
    logits.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []

    freeze(backbone, [0, 2])
    frozen = [not p.requires_grad for p in backbone.parameters()]
    assert any(frozen)
    assert not all(frozen)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_drops_paths_in_training_alone(name: str) -> None:
    """With `model.vit_dpr` passes of training differ, those of evaluation do not."""
    width, stride = FAMILIES[name]
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}", crop_size=4 * stride, drop_path=0.9)
    rates = [module.drop_prob for module in backbone.modules() if type(module).__name__ == "DropPath"]
    assert rates, "no path is ever dropped"
    assert 0.0 < max(rates) <= 0.9
    with torch.no_grad():
        for scale in (p for p in backbone.parameters() if not p.any()):
            scale.fill_(1.0)  # ResNet's branches begin at nothing: dropped or not would be the same
    images = torch.randn(2, 3, 4 * stride, 4 * stride)

    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return backbone(images)

    with torch.no_grad():
        backbone.train()
        assert len({float(features(seed).double().sum()) for seed in range(4)}) > 1
        backbone.eval()
        assert torch.equal(features(0), features(1))
        assert features(0).shape[1] == width


@pytest.mark.parametrize(("stride", "width"), [(16, 256), (8, 128), (4, 64), (12, 128)])
def test_a_finer_map_can_be_taken(stride: int, width: int) -> None:
    backbone = build_backbone("timm/resnet18", crop_size=64, feature_stride=stride)
    side = 64 // backbone.stride
    assert (backbone.width, backbone.stride) == (width, min(stride, 8) if stride < 16 else 16)
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, width, side, side)


def test_frozen_stages_keep_their_statistics() -> None:
    backbone = build_backbone("timm/resnet18", crop_size=32)
    freeze(backbone, [0])
    backbone.train()
    before = backbone.model.bn1.running_mean.clone()
    other = backbone.model.layer1[0].bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 32, 32))
    assert torch.equal(backbone.model.bn1.running_mean, before)
    assert not torch.equal(backbone.model.layer1[0].bn1.running_mean, other)


def test_map_is_the_models_own() -> None:
    """The patch tokens without class token and registers, in their places."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True).eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    backbone = build_backbone("timm/vit_small_patch14_reg4_dinov2").eval()
    report = load_backbone(backbone, recognise(buffer.getvalue(), "dino.pth"))
    assert len(report.matched) == len(backbone.state_dict())
    images = torch.randn(1, 3, 56, 42)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 5:]
        torch.testing.assert_close(backbone(images).flatten(2).transpose(1, 2), tokens)


def test_layers_beyond_the_map_are_cut_off_and_ignored_on_loading() -> None:
    model = timm.create_model("convnext_atto", num_classes=5)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    backbone = build_backbone("timm/convnext_atto", drop_path=0.1)
    report = load_backbone(backbone, recognise(buffer.getvalue(), "convnext.pth"))
    assert {name.split(".")[0] for name in report.ignored} == {"stages", "head"}
    assert not any(".stages.3." in name for name in backbone.state_dict())


def test_unknown_model_and_no_drop_path() -> None:
    with pytest.raises(SpecError, match=r"no model 'convnext_ato'; did you mean .*timm/convnext_atto"):
        build_backbone("timm/convnext_ato")
    with pytest.raises(SpecError, match=r"model\.vit_dpr: timm/vgg11"):
        build_backbone("timm/vgg11", drop_path=0.1)
