"""The mask network: shapes, bands, the teacher, and agreement with the peer."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal.architectures import Architecture
from mal.boxes import band_index
from mal.errors import SpecError
from mal.model.backbones import VitBackbone, build_backbone
from mal.model.network import MalNetwork, StudentTeacher, band_of


def areas_of(corners: torch.Tensor) -> torch.Tensor:
    """Areas of boxes [B, 4] given by their corners."""
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def test_bands_together_equal_one_by_one(tiny_network: MalNetwork) -> None:
    images = torch.randn(6, 3, 64, 64)
    areas = torch.tensor([20000.0, 500.0, 5000.0, 100.0, 4000.0, 9216.0], dtype=torch.float64)
    with torch.no_grad():
        together = tiny_network(images, areas)
        alone = torch.cat([tiny_network(images[i : i + 1], areas[i : i + 1]) for i in range(6)])
    assert together.shape == (6, 16, 16)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together, tiny_network(images, areas.flip(0)), atol=1e-4)  # the band matters


@pytest.mark.parametrize("area", [0.0, 1024.0, 9216.0, 1e12])
def test_every_area_has_logits(tiny_network: MalNetwork, area: float) -> None:
    logits = tiny_network(torch.randn(1, 3, 32, 32), torch.tensor([area]))
    assert logits.abs().max() > 0


@given(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1024.0, 9216.0]), min_size=1))
def test_bands_are_those_of_the_boxes(areas: list[float]) -> None:
    assert band_of(torch.tensor(areas, dtype=torch.float64)).tolist() == band_index(areas).tolist()


@settings(max_examples=25, deadline=None)
@given(
    num_convs=st.integers(1, 5),
    scale=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    scale_pre=st.sampled_from([0.3, 1.0, 1.7, 2.0]),
    adjust=st.booleans(),
    side=st.integers(1, 3),
)
def test_any_mask_head_gives_logits_of_the_same_size(
    num_convs: int, scale: float, scale_pre: float, adjust: bool, side: int
) -> None:
    network = MalNetwork(
        VitBackbone(Architecture("one block", "vit", 8, 2, 1, 16)),
        num_convs=num_convs,
        hidden=4,
        out=4,
        scale=scale,
        scale_pre=scale_pre,
        adjust_scale=adjust,
    )
    logits = network(torch.randn(3, 3, 16 * side, 16 * side), torch.tensor([10.0, 5000.0, 50000.0]))
    assert logits.shape == (3, *[(4 if adjust else 8) * side] * 2)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_crop_that_the_stride_does_not_divide(tiny_network: MalNetwork) -> None:
    with pytest.raises(SpecError, match=r"dataset\.crop_size: 40 .* 16"):
        tiny_network(torch.zeros(1, 3, 40, 40), torch.zeros(1))


def test_bfloat16_changes_little(tiny_network: MalNetwork) -> None:
    images, areas = torch.randn(2, 3, 32, 32), torch.tensor([100.0, 20000.0])
    with torch.no_grad():
        exact = tiny_network(images, areas)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = tiny_network(images, areas)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05 * exact.std().item())


class WithBuffers(torch.nn.Module):
    """Stands for a network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
        self.norm = torch.nn.BatchNorm1d(2)


def test_teacher_is_a_copy_then_an_average() -> None:
    pair = StudentTeacher(WithBuffers())  # type: ignore[arg-type]
    assert pair.teacher.weight.tolist() == [0.0, 1.0]
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    with torch.no_grad():
        pair.student.weight.add_(1.0)
        pair.student.norm.running_mean.fill_(2.0)
        pair.student.norm.num_batches_tracked.fill_(7)
    pair.update_teacher(0.75)
    assert pair.teacher.weight.tolist() == [0.25, 1.25]
    assert pair.teacher.norm.running_mean.tolist() == [0.5, 0.5]
    assert pair.teacher.norm.num_batches_tracked == 7
    assert pair.teacher.weight.grad_fn is None


def test_teacher_stays_in_evaluation_mode(tiny_network: MalNetwork) -> None:
    pair = StudentTeacher(tiny_network).train()
    assert pair.student.training
    assert not any(module.training for module in pair.teacher.modules())


def test_state_dict_has_both_prefixes(tiny_network: MalNetwork) -> None:
    names = StudentTeacher(tiny_network).state_dict()
    assert {name.split(".")[0] for name in names} == {"student", "teacher"}


@pytest.mark.shared
@pytest.mark.parametrize("case", ["crop512", "crop256", "crop512_not_adjust_scale"])
def test_vit_logits_agree_with_the_peer(reference, case: str) -> None:
    saved = reference.load("model_vit_tiny.pt")
    expected = saved["cases"][case]
    network = MalNetwork(build_backbone("vit-deit-tiny/16"), adjust_scale="not_adjust" not in case).eval()
    network.load_state_dict({key: value.float() for key, value in saved["state_dict"].items()})
    images = reference.crops(case[:7])
    with torch.no_grad():
        features = network.features(images)
        logits = network.logits(features, areas_of(expected["bbox"]))
    difference = (logits - expected["seg"][:, 0]).abs().max()
    assert difference < 1e-3 * expected["seg"].abs().max()
    assert difference < 1e-4  # measured: 3e-5, the noise of float32
    if "spatial_feat_ch0_15_of_item0" in expected:
        torch.testing.assert_close(features[0, :16], expected["spatial_feat_ch0_15_of_item0"], rtol=1e-4, atol=1e-4)


@pytest.mark.shared
def test_boxes_on_the_border_of_two_bands(reference) -> None:
    """Where the peer gives zeros: areas of exactly 1024, 9216 and 0."""
    saved = reference.load("model_vit_tiny.pt")
    network = MalNetwork(build_backbone("vit-deit-tiny/16")).eval()
    network.load_state_dict({key: value.float() for key, value in saved["state_dict"].items()})
    corners = saved["cases"]["crop256_bin_edges"]["bbox"]
    assert areas_of(corners).tolist() == [1024.0, 9216.0, 0.0]
    with torch.no_grad():
        logits = network(reference.crops("crop256"), areas_of(corners))
    assert (logits.abs().amax(dim=(1, 2)) > 1).all()


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    ["vit-deit-tiny/16", "vit-mae-base/16"],
)
def test_names_and_shapes_are_the_peers(reference, name: str) -> None:
    file = reference.folder / f"keys_tao_{name.replace('/', '-')}.json"
    expected = {k: v for k, v in json.loads(file.read_text())["keys"].items() if ".backbone.head." not in k}
    with torch.device("meta"):
        pair = StudentTeacher(MalNetwork(build_backbone(name)))
    assert {key: list(value.shape) for key, value in pair.state_dict().items()} == expected
