"""The views of a training crop: what is random, how often, and that nothing else is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mal.data import augment
from mal.data.augment import draw_change, flip, sample_generator, student_view, views


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC))


def _view(pixels: NDArray[np.uint8], change: NDArray[np.float32]) -> NDArray[np.float32]:
    crop = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return student_view(crop, torch.from_numpy(change)[None])[0].permute(1, 2, 0).numpy()


def _only(part: str, amount: float) -> NDArray[np.float32]:
    """A change of one kind."""
    change = np.zeros(augment.CHANGE, np.float32)
    change[augment.ORDER : augment.AMOUNT] = -1
    if part == "grey":
        change[augment.GREY] = 1
    elif part == "blur":
        change[augment.RADIUS] = amount
    else:
        change[augment.ORDER + 2], change[augment.AMOUNT + 2] = list(augment.JITTER).index(part), amount
    return change


def test_the_same_key_draws_the_same_and_no_global_state_is_touched(pixels: NDArray[np.uint8]) -> None:
    before = pickle.dumps(np.random.get_state()), torch.get_rng_state()
    changes = [draw_change(sample_generator(3, 1, k)) for k in range(20)]
    again = [draw_change(sample_generator(3, 1, k)) for k in reversed(range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(changes, reversed(again), strict=True))
    seen = [_view(pixels, change) for change in changes]
    assert all(np.array_equal(view, _view(pixels, change)) for view, change in zip(seen, changes, strict=True))
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


def test_how_often_each_change_is_made_and_how_much() -> None:
    changes = np.array([draw_change(sample_generator(1, 0, k)) for k in range(2000)])
    orders, amounts = changes[:, augment.ORDER : augment.AMOUNT], changes[:, augment.AMOUNT :]
    jittered = (orders >= 0).all(axis=1)
    assert (jittered | (orders < 0).all(axis=1)).all()
    assert jittered.mean() == pytest.approx(0.5, abs=0.04)
    assert changes[:, augment.GREY].mean() == pytest.approx(0.2, abs=0.03)
    blurred = changes[changes[:, augment.RADIUS] > 0, augment.RADIUS]
    assert len(blurred) / 2000 == pytest.approx(0.5, abs=0.04)
    assert 0.1 <= blurred.min() < 0.15 < 1.95 < blurred.max() <= 2.0
    assert (np.sort(orders[jittered], axis=1) == range(4)).all()
    assert len(np.unique(orders[jittered], axis=0)) == 24  # all orders occur
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for part, (low, high) in zip(augment.JITTER, ranges.values(), strict=True):
        drawn = amounts[orders == list(augment.JITTER).index(part)]
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn.max() <= high


def test_strength_scales_all_of_it(pixels: NDArray[np.uint8]) -> None:
    def change(strength: float) -> float:
        views = (_view(pixels, draw_change(sample_generator(1, 0, k), strength)) for k in range(100))
        return float(np.mean([np.abs(view - pixels).mean() for view in views]))

    assert change(0.0) == 0.0
    assert 0.05 * change(1.0) < change(0.25) < 0.6 * change(1.0)


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_is_torchvisions(part: str, pixels: NDArray[np.uint8]) -> None:
    plain = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation,
        "hue": functional.adjust_hue,
    }[part]
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    for amount in (-0.1, 0.03, 0.1) if part == "hue" else (0.6, 1.0, 1.4):
        expected = 255 * plain(planes, amount).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(_view(pixels, _only(part, amount)), expected, atol=0.15)


def test_grey_and_blur_are_pillows(pixels: NDArray[np.uint8]) -> None:
    image = Image.fromarray(pixels)
    grey = _view(pixels, _only("grey", 1))
    assert np.abs(grey - np.asarray(image.convert("L"))[..., None]).max() <= 1
    for radius in (0.1, 0.7, 1.3, 2.0):  # Pillow's is a close approximation to a Gaussian
        expected = np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(float)
        off = np.abs(_view(pixels, _only("blur", radius)) - expected)
        assert off.mean() < 0.75
        assert off.max() < 8


def test_a_batch_is_its_crops_one_by_one_and_they_stay_as_they_are(pixels: NDArray[np.uint8]) -> None:
    """Also what is in a batch with it must not change a sample: the number of workers would."""
    crops = torch.from_numpy(np.stack([np.roll(pixels, 7 * k, axis=0) for k in range(12)])).permute(0, 3, 1, 2)
    before = crops.clone()
    changes = torch.from_numpy(np.stack([draw_change(sample_generator(4, 0, k)) for k in range(12)]))
    together = student_view(crops, changes)
    assert torch.equal(crops, before)
    assert torch.equal(together, torch.cat([student_view(crops[k : k + 1], changes[k : k + 1]) for k in range(12)]))
    same = (changes[:, augment.ORDER] < 0) & (changes[:, augment.GREY] == 0) & (changes[:, augment.RADIUS] == 0)
    assert same.any()
    assert not same.all()
    assert [torch.equal(a, b) for a, b in zip(together, crops.float(), strict=True)] == same.tolist()


def test_the_order_of_the_jitter_counts(pixels: NDArray[np.uint8]) -> None:
    change = _only("brightness", 1.4)
    change[augment.ORDER : augment.AMOUNT], change[augment.AMOUNT :] = (0, 1, 2, 3), (1.4, 0.6, 1.0, 0.0)
    other = change.copy()
    other[augment.ORDER : augment.AMOUNT], other[augment.AMOUNT :] = (1, 0, 2, 3), (0.6, 1.4, 1.0, 0.0)
    first = _view(_view(pixels, _only("brightness", 1.4)).round().astype(np.uint8), _only("contrast", 0.6))
    assert np.abs(_view(pixels, change) - first).max() < 1.5
    assert np.abs(_view(pixels, other) - first).max() > 5


def test_where_many_are_changed_at_a_time_the_same_comes_out(
    pixels: NDArray[np.uint8],
) -> None:
    """What a GPU does, on the CPU: all samples of a kind at once, and the widest blur for all."""
    crops = torch.from_numpy(np.stack([pixels] * 8)).permute(0, 3, 1, 2).float()
    for part, change in augment._PARTS.items():
        amounts = torch.linspace(-0.1, 0.1, 8) if part == "hue" else torch.linspace(0.6, 1.4, 8)
        alone = torch.cat([change(crops[k : k + 1], amounts[k : k + 1]) for k in range(8)])
        torch.testing.assert_close(change(crops, amounts), alone, atol=1e-3, rtol=0)
    radii = torch.linspace(0.1, 2.0, 8)
    alone = torch.cat([augment._blurred(crops[k : k + 1], radii[k : k + 1]) for k in range(8)])
    assert (augment._blurred(crops, radii) - alone).abs().max() < 1.0  # what is beyond three deviations


def test_views_are_normalised_as_torchvision_does(pixels: NDArray[np.uint8]) -> None:
    plain = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    batch = {
        "crop": torch.from_numpy(np.stack([pixels, pixels[::-1]])).permute(0, 3, 1, 2).contiguous(),
        "change": torch.from_numpy(np.stack([_only("brightness", 1.0), _only("grey", 1)])),
        "box_mask": torch.ones(2, 48, 48, dtype=torch.uint8),
        "area": torch.tensor([1.0, 2.0]),
        "id": torch.tensor([1, 2]),
    }
    made = views(batch, torch.device("cpu"))
    assert set(made) == {"image", "teacher_image", "box_mask", "area", "id"}
    for k, side in enumerate((pixels, pixels[::-1])):
        torch.testing.assert_close(made["teacher_image"][k], torch.as_tensor(plain(side.copy())), atol=1e-5, rtol=0)
    torch.testing.assert_close(made["image"][0], made["teacher_image"][0], atol=1e-5, rtol=0)
    assert not torch.allclose(made["image"][1], made["teacher_image"][1], atol=0.1)
    assert made["image"].dtype == torch.float32
    assert made["image"].is_contiguous()
