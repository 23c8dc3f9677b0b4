"""A convolution of an enlarged map, computed on the small one, against enlarging and convolving."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mal.model.enlarged_conv import enlarged_conv, pays
from mal.model.network import MaskHead


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    small=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    large=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    biased=st.booleans(),
    last=st.booleans(),
)
def test_equals_enlarging_and_convolving_with_its_gradients(
    seed: int, small: tuple[int, int], large: tuple[int, int], biased: bool, last: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *small, generator=random, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    weight = torch.randn(5, 3, 3, 3, generator=random, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=random, dtype=torch.float64, requires_grad=True) if biased else None
    inputs = [x, weight, bias] if bias is not None else [x, weight]
    expected = F.conv2d(F.interpolate(x, large, mode="bilinear"), weight, bias, padding=1)
    found = enlarged_conv(x, weight, bias, large)
    torch.testing.assert_close(found, expected)
    along = torch.randn(found.shape, generator=random, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, inputs, along), torch.autograd.grad(expected, inputs, along), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_it_is_done_on_cpus_in_float32_where_the_map_grows() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert pays(x, (8, 8))
    assert not pays(x, (5, 5))
    assert not pays(x.double(), (8, 8))
    assert not pays(x.to("meta"), (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, (8, 8))


@pytest.mark.parametrize("size", [(16, 16), (4, 4), (8, 8), (3, 11), None])
@pytest.mark.parametrize("convs", [1, 3, 4, 5])
def test_the_mask_head_is_the_same_in_either_way(size: tuple[int, int] | None, convs: int) -> None:
    torch.manual_seed(0)
    head = MaskHead(6, num_convs=convs, hidden=8, out=7)
    x = torch.randn(2, 6, 8, 8)
    found = head(x, size)
    assert found.shape == (2, 7, *(2 * side for side in size or (8, 8)))
    torch.testing.assert_close(found, head.double()(x.double(), size).float(), atol=1e-5, rtol=1e-4)


def test_a_matrix_made_while_labelling_serves_training() -> None:
    weight = torch.randn(2, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        enlarged_conv(torch.randn(1, 3, 5, 6), weight, None, (13, 14))
    enlarged_conv(torch.randn(1, 3, 5, 6, requires_grad=True), weight, None, (13, 14)).sum().backward()
    assert weight.grad is not None
