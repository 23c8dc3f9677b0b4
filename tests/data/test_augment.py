"""The views of a training crop: what is random, how often, and that nothing else is."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from mal.data import augment
from mal.data.augment import flip, normalised, sample_generator, student_view


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC))


def test_the_same_key_gives_the_same_view_and_no_global_state_is_touched(pixels: NDArray[np.uint8]) -> None:
    before = pickle.dumps(np.random.get_state()), torch.get_rng_state()
    views = [student_view(pixels, sample_generator(3, 1, k)) for k in range(20)]
    again = [student_view(pixels, sample_generator(3, 1, k)) for k in reversed(range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert before[0] == pickle.dumps(np.random.get_state())
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("other", [(4, 1, 0), (3, 2, 0), (3, 1, 1)])
def test_seed_epoch_and_index_all_count(other: tuple[int, int, int]) -> None:
    assert sample_generator(3, 1, 0).random() != sample_generator(*other).random()


def test_flip_mirrors_both_or_neither_half_of_the_time(pixels: NDArray[np.uint8]) -> None:
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[:, :5] = 1
    flipped = 0
    for k in range(400):
        seen, seen_mask = flip(pixels, mask, sample_generator(0, 0, k))
        mirrored = bool(seen_mask[0, -1])
        assert np.array_equal(seen, pixels[:, ::-1] if mirrored else pixels)
        assert np.array_equal(seen_mask, mask[:, ::-1] if mirrored else mask)
        flipped += mirrored
    assert 160 < flipped < 240


def test_how_often_each_change_is_made(pixels: NDArray[np.uint8]) -> None:
    same = grey = 0
    for k in range(600):
        view = student_view(pixels, sample_generator(1, 0, k))
        assert view.shape == pixels.shape
        assert view.dtype == np.uint8
        same += np.array_equal(view, pixels)
        grey += int(np.ptp(view.astype(int), axis=2).max()) == 0
    assert 0.14 < same / 600 < 0.26  # 0.5 * 0.8 * 0.5 = 0.2
    assert 0.15 < grey / 600 < 0.26


def test_strength_scales_all_of_it(pixels: NDArray[np.uint8]) -> None:
    def change(strength: float) -> float:
        views = (student_view(pixels, sample_generator(1, 0, k), strength) for k in range(100))
        return float(np.mean([np.abs(view.astype(float) - pixels).mean() for view in views]))

    assert change(0.0) == 0.0
    assert 0.05 * change(1.0) < change(0.25) < 0.6 * change(1.0)


@pytest.mark.parametrize("only", ["JITTER", "GREY", "BLUR"])
def test_each_change_does_what_it_says(only: str, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITTER", "GREY", "BLUR"):
        monkeypatch.setattr(augment, f"{name}_PROBABILITY", 1.0 if name == only else 0.0)
    view = student_view(pixels, sample_generator(2, 0, 1)).astype(float)
    was = pixels.astype(float)
    edges = [np.abs(np.diff(p, axis=1)).mean() for p in (was, view)]
    if only == "JITTER":
        assert np.abs(view - was).mean() > 2
        assert np.corrcoef(view.mean(axis=2).ravel(), was.mean(axis=2).ravel())[0, 1] > 0.9
    elif only == "GREY":
        luma = was @ (0.299, 0.587, 0.114)
        assert np.abs(view - luma[..., None]).max() <= 1
    else:
        assert edges[1] < 0.98 * edges[0]
        assert np.abs(view.mean(axis=(0, 1)) - was.mean(axis=(0, 1))).max() < 3


def test_jitter_spans_its_ranges(pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {name: [] for name in augment.JITTER}

    def recorder(name: str) -> Callable[[Image.Image, float], Image.Image]:
        def record(image: Image.Image, amount: float) -> Image.Image:
            drawn[name].append(amount)
            return image

        return record

    for name in drawn:
        monkeypatch.setattr(augment.functional, f"adjust_{name}", recorder(name))
    for k in range(300):
        student_view(pixels, sample_generator(5, 0, k))
    for name, (low, high) in {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
    }.items():
        assert 110 < len(drawn[name]) < 190
        assert low <= min(drawn[name]) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(drawn[name]) <= high


def test_normalised_is_torchvisions(pixels: NDArray[np.uint8]) -> None:
    plain = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    ours = normalised(pixels[:, ::-1])
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, torch.as_tensor(plain(pixels[:, ::-1].copy())), atol=1e-5, rtol=0)
