"""The mean field against a plain unfolded version of the formula, and against the peer's masks."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mal.model import mean_field as module
from mal.model.mean_field import fastest, mean_field, plain, refine


def unfolded(
    image: Tensor,
    probabilities: Tensor,
    box: Tensor | None,
    *,
    kernel_size: int,
    zeta: float,
    iterations: int,
    low: float,
    high: float,
) -> Tensor:
    """METHOD section 4, word by word: every neighbourhood is laid out, and summed."""
    batch, _, height, width = image.shape
    k, window = kernel_size**2, (batch, -1, kernel_size**2, height, width)
    inside = F.unfold(torch.ones_like(image[:, :1]), kernel_size, padding=kernel_size // 2).view(
        batch, k, height, width
    )
    colours = F.unfold(image, kernel_size, padding=kernel_size // 2).view(window)
    affinity = torch.exp(-(colours - image[:, :, None]).square().sum(1) / (2 * zeta**2)) * inside
    box = torch.ones_like(probabilities) if box is None else box
    q = (probabilities * box).clamp(low, high)
    for _ in range(iterations):
        costs = torch.stack((-torch.log(1 - q), -torch.log(q)), 1)
        neighbours = F.unfold(costs, kernel_size, padding=kernel_size // 2).view(window)
        a0, a1 = torch.exp(-(affinity[:, None] * neighbours).sum(2)).unbind(1)
        a1 = a1 * box
        q = (a1 / (1e-6 + a0 + a1)).clamp(low, high)
    return q


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel_size=st.sampled_from([1, 3, 5]),
    zeta=st.sampled_from([0.1, 0.5, 2.0]),
    boxed=st.booleans(),
)
def test_equals_the_unfolded_formula(
    seed: int, height: int, width: int, kernel_size: int, zeta: float, boxed: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, height, width, generator=random).double()
    probabilities = torch.rand(2, height, width, generator=random).double()
    box = (torch.rand(2, height, width, generator=random) * 1.5).clamp(max=1).double() if boxed else None
    options = {"kernel_size": kernel_size, "zeta": zeta, "iterations": 3, "low": 0.1, "high": 0.9}
    expected = unfolded(image, probabilities, box, **options)  # type: ignore[arg-type]
    for way in (mean_field, plain):
        q = way(image, probabilities, box, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(q, expected.float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    kernel_size=st.sampled_from([1, 3, 5, 7, 9]),
    zeta=st.sampled_from([0.5, 2.0]),
    limits=st.sampled_from([(0.1, 0.9), (0.001, 0.99), (0.4, 0.4)]),
    boxed=st.booleans(),
    strided=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_compiled_loop_equals_plain_torch(
    seed: int,
    shape: tuple[int, int, int, int],
    kernel_size: int,
    zeta: float,
    limits: tuple[float, float],
    boxed: bool,
    strided: bool,
    threads: int,
) -> None:
    batch, channels, height, width = shape
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, channels, height, width, generator=random)
    probabilities = torch.rand(batch, height, width, generator=random)
    box = (torch.rand(batch, height, width, generator=random) * 1.5).clamp(max=1) if boxed else None
    if strided:
        image = image.to(memory_format=torch.channels_last)
        probabilities = probabilities.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"kernel_size": kernel_size, "zeta": zeta, "iterations": 3, "low": limits[0], "high": limits[1]}
    assert fastest("cpu") is not plain, "numba is a dependency of this project"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = mean_field(image, probabilities, box, **options)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    expected = plain(image, probabilities, box, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-4)


def test_without_numba_plain_torch_is_used_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mal.model.mean_field_cpu", None)
    monkeypatch.setattr(module, "fastest", functools.cache(fastest.__wrapped__))
    inputs = torch.randn(1, 3, 6, 6), torch.rand(1, 6, 6), None
    with caplog.at_level(logging.INFO):
        first, second = mean_field(*inputs), mean_field(*inputs)
    assert torch.equal(first, second)
    assert [r.getMessage().startswith("the mean field runs in plain torch") for r in caplog.records] == [True]


def test_limits_that_the_compiled_logarithm_does_not_know_are_left_to_plain_torch() -> None:
    image, probabilities = torch.randn(1, 3, 6, 6), torch.rand(1, 6, 6)
    options = {"kernel_size": 3, "zeta": 1.0, "iterations": 1, "low": 0.0, "high": 0.9}
    q = mean_field(image, probabilities, None, **options)  # type: ignore[arg-type]
    assert torch.equal(q, plain(image, probabilities, None, **options))  # type: ignore[arg-type]
    assert mean_field(torch.randn(0, 3, 6, 6), torch.rand(0, 6, 6), None).shape == (0, 6, 6)


def test_snaps_to_a_colour_edge() -> None:
    """A blurred step in probability becomes sharp where the colour changes."""
    image = torch.zeros(1, 3, 8, 16)
    image[..., 9:] = 3.0
    probabilities = torch.linspace(0.9, 0.1, 16).expand(1, 8, 16)  # crosses one half between columns 7 and 8
    mask = refine(image, probabilities, None)
    assert (mask[0] == (torch.arange(16) < 9)).all()


def test_inputs_stay_and_nothing_outside_the_box() -> None:
    image, probabilities, box = torch.randn(1, 3, 6, 6), torch.rand(1, 6, 6), torch.zeros(1, 6, 6)
    box[:, 2:4, 1:5] = 1
    before = [x.clone() for x in (image, probabilities, box)]
    mask = refine(image, probabilities.requires_grad_(), box, iterations=5)
    assert all(torch.equal(x, y) for x, y in zip((image, probabilities, box), before, strict=True))
    assert not mask.requires_grad
    assert (mask * (1 - box)).sum() == 0


def test_half_precision_is_computed_in_single() -> None:
    image, probabilities = torch.randn(1, 3, 6, 6).bfloat16(), torch.rand(1, 6, 6).bfloat16()
    torch.testing.assert_close(
        mean_field(image, probabilities, None), mean_field(image.float(), probabilities.float(), None)
    )


@pytest.mark.shared
@pytest.mark.parametrize("way", [refine, plain])
@pytest.mark.parametrize("box", ["box", "none"])
@pytest.mark.parametrize("run", ["k3_it100_z0.1", "k5_it10_z0.1", "k3_it10_z0.5"])
def test_masks_are_the_peers(reference, run: str, box: str, way: Callable[..., Tensor]) -> None:
    saved = reference.load("mean_field.pt")
    expected = saved["runs"][f"{run}_{box}"]
    mask = way(
        saved["image"],
        saved["seg"],
        saved["boxmask"] if expected["use_box"] else None,
        kernel_size=expected["kernel_size"],
        zeta=expected["zeta"],
        iterations=expected["num_iter"],
        low=expected["low"],
        high=expected["high"],
    )
    mask = mask if way is refine else (mask > 0.5).float()
    ambiguous = (expected["soft64"] - 0.5).abs() < 1e-3
    assert ambiguous.sum() == expected["n_ambiguous_1e3"]
    assert not ((mask != expected["out"]) & ~ambiguous).any()


def test_is_faster_than_unfolding() -> None:
    """Measured: 18 times on one thread; asked: more than six, as the machine may be busy."""
    image, probabilities, box = torch.randn(1, 3, 128, 128), torch.rand(1, 128, 128), torch.ones(1, 128, 128)
    options = {"kernel_size": 3, "zeta": 0.1, "iterations": 20, "low": 0.1, "high": 0.9}

    def seconds(function) -> float:
        times = []
        for _ in range(4):
            start = time.process_time()
            function(image, probabilities, box, **options)
            times.append(time.process_time() - start)
        return min(times)

    assert 6 * seconds(mean_field) < seconds(unfolded)
