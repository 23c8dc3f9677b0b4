"""FAN: names and logits of the peer, and its two departures from a plain reading of them."""

from __future__ import annotations

import io
import json

import pytest
import torch

from mal.architectures import ARCHITECTURES, Architecture
from mal.model.backbones import freeze
from mal.model.fan import ChannelProcessing, FanBackbone, PatchTokensOfClassAttention
from mal.model.network import MalNetwork, StudentTeacher
from mal.model.weights import identify_architecture, load_backbone, recognise

TINY = Architecture("tiny fan", "fan", 16, 2, 2, 16)
TINY_HYBRID = Architecture("tiny hybrid", "fan_hybrid", 16, 2, 2, 16, stem_depths=(1, 1))
FANS = [name for name, architecture in ARCHITECTURES.items() if architecture.family != "vit"]


def test_channel_gates_by_hand() -> None:
    """Gates, one channel at a time, as the formula has them."""
    torch.manual_seed(0)
    channels = ChannelProcessing(8, heads=2).eval()
    with torch.no_grad():
        channels.temperature.copy_(torch.tensor([0.5, 2.0])[:, None, None])
        x = torch.randn(3, 6, 8)
        q, values = channels.q(x), channels.norm_v(channels.mlp_v(x, 2, 3))
        expected = torch.empty_like(values)
        for c in range(8):
            head = slice(0, 4) if c < 4 else slice(4, 8)
            overlap = (q[:, :, c].softmax(1) * x[:, :, head].softmax(1).mean(2)).sum(1)
            expected[:, :, c] = values[:, :, c] * (overlap.sigmoid() * (0.5 if c < 4 else 2.0))[:, None]
        torch.testing.assert_close(channels(x, 2, 3), expected)


def test_patch_tokens_do_not_see_the_class_token() -> None:
    """Why the class attention need not be computed: timm's full block gives the same patch tokens."""
    torch.manual_seed(0)
    block = PatchTokensOfClassAttention(16, 2).eval()
    x = torch.randn(2, 5, 16)
    full = super(PatchTokensOfClassAttention, block).forward(torch.cat((torch.randn(2, 1, 16), x), dim=1))
    torch.testing.assert_close(block(x), full[:, 1:])


@pytest.mark.parametrize("architecture", [TINY, TINY_HYBRID], ids=lambda a: a.family)
def test_trains_at_any_size(architecture: Architecture) -> None:
    backbone = FanBackbone(architecture, drop_path=0.1)
    for side in (32, 48):
        features = backbone(torch.randn(2, 3, side, side))
        assert features.shape == (2, 16, side // 16, side // 16)
    features.square().sum().backward()
    without = [n for n, p in backbone.named_parameters() if (p.grad is None) == p.requires_grad]
    assert without == []  # data-parallel training needs a gradient for every trained parameter


def test_freezing_stops_the_statistics_too() -> None:
    backbone = FanBackbone(TINY)
    freeze(backbone, [0, 2])
    backbone.train()
    backbone(torch.randn(2, 3, 32, 32))
    counters = {n: int(b) for n, b in backbone.named_buffers() if n.endswith("num_batches_tracked")}
    assert counters["patch_embed.proj.0.1.num_batches_tracked"] == 0
    assert counters["blocks.0.mlp.mlp_v.dwconv.bn.num_batches_tracked"] == 1
    assert counters["blocks.1.mlp.mlp_v.dwconv.bn.num_batches_tracked"] == 0


def test_public_weights_with_prefix_are_recognised() -> None:
    source, target = FanBackbone(TINY), FanBackbone(TINY)
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": {**state, "backbone.head.weight": torch.zeros(2)}}, buffer)
    report = load_backbone(target, recognise(buffer.getvalue(), "fan.pth.tar"))
    assert report.ignored == ("head.weight",)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(target.eval()(images), source.eval()(images))


@pytest.mark.parametrize("name", FANS)
def test_architecture_is_seen_from_the_shapes(name: str) -> None:
    with torch.device("meta"):
        assert identify_architecture(FanBackbone(ARCHITECTURES[name]).state_dict()) == name


@pytest.mark.shared
@pytest.mark.parametrize("name", ["fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid", "fan_small_12_p4_hybrid"])
def test_names_and_shapes_are_the_peers(reference, name: str) -> None:
    listed = json.loads((reference.folder / f"keys_tao_{name}.json").read_text())
    expected = {k: v for k, v in listed["keys"].items() if ".backbone.head." not in k}
    with torch.device("meta"):
        pair = StudentTeacher(MalNetwork(FanBackbone(ARCHITECTURES[name])))
    own = {key: list(value.shape) for key, value in pair.state_dict().items()}
    assert own.keys() == expected.keys()
    differing = {key.split(".", 1)[1] for key in own if own[key] != expected[key]}
    # The peer gives the small hybrid heads for 448 channels, so it cannot run: a defect that is not followed.
    heads = {"roi_head.mlp1.weight", "mask_head.convs.0.conv.weight"}
    assert differing == (heads if name == "fan_small_12_p4_hybrid" else set())
    assert {name for name, _ in pair.named_buffers()} == set(listed["buffers"])


@pytest.mark.shared
@pytest.mark.parametrize("case", ["crop256", "crop512_not_adjust_scale"])
def test_logits_agree_with_the_peer(reference, case: str) -> None:
    saved = reference.load("model_fan_tiny_8_p4_hybrid.pt")
    expected = saved["cases"][case]
    count = len(expected["seg"])
    backbone = FanBackbone(ARCHITECTURES["fan_tiny_8_p4_hybrid"])
    network = MalNetwork(backbone, adjust_scale="not_adjust" not in case).eval()
    network.load_state_dict({key: value.float() for key, value in saved["state_dict"].items()})
    corners = expected["bbox"][:count]
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    with torch.no_grad():
        features = network.features(reference.crops(case[:7])[:count])
        logits = network.logits(features, areas)
    difference = (logits - expected["seg"][:, 0]).abs().max()
    assert difference < 1e-4  # measured: 3e-5, the noise of float32; the logits reach 15
    if "spatial_feat_ch0_15_of_item0" in expected:
        torch.testing.assert_close(features[0, :16], expected["spatial_feat_ch0_15_of_item0"], rtol=1e-4, atol=1e-4)
