"""The predictor against the plain reference of every step."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from mal import boxes, crops, masks, pasting, predictor
from mal.boxes import Box
from mal.crops import IMAGENET_MEAN, IMAGENET_STD
from mal.errors import SpecError
from mal.model.losses import MeanFieldOptions
from mal.predictor import BoxItem, Predictor

SIZE = 64


class Brightness(nn.Module):
    """Logits that depend on the crop, its position and the box's area: a stand-in for the network."""

    def __init__(self, channel: int = 0, keep_channel: bool = False) -> None:
        super().__init__()
        self.channel, self.keep_channel = channel, keep_channel
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, areas: Tensor) -> Tensor:
        assert images.is_contiguous()
        assert not self.training
        small = F.avg_pool2d(images[:, self.channel : self.channel + 1], 4)
        ramp = torch.linspace(-1, 1, small.shape[-1])
        logits = self.gain * small + ramp + (areas > 100)[:, None, None, None]
        return logits if self.keep_channel else logits[:, 0]


class Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor, areas: Tensor) -> Tensor:
        return self.logits.expand(len(images), *self.logits.shape)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some sharp edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, width // 4 : width // 2] = 255
    return image


def plain_masks(logits: Tensor, item: BoxItem, threshold: float, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """METHOD section 5 word by word, with image-sized arrays: the mask, and pixels too close to the threshold."""
    height, width = item.image.shape[:2]
    window = boxes.central_window(item.box)
    crop = F.interpolate(logits[None, None], (size, size), mode="bilinear").sigmoid()
    crop = crop * torch.from_numpy(crops.box_mask(window, item.box, width, height, size))
    probability = F.interpolate(crop, (window.height, window.width), mode="bilinear")[0, 0].numpy()
    image = np.zeros((height, width), dtype=np.float32)
    crops.paste(image, probability, window)
    allowed = boxes.outer_pixels(item.box, width, height)
    inside = np.zeros((height, width), dtype=bool)
    inside[allowed.y0 : allowed.y1, allowed.x0 : allowed.x1] = True
    return (image > threshold) & inside, np.abs(image - threshold) < 1e-5


@st.composite
def clipped_boxes(draw: st.DrawFn, width: int, height: int) -> Box:
    edges = [sorted(draw(st.tuples(st.floats(0, side), st.floats(0, side)))) for side in (width, height)]
    (x0, x1), (y0, y1) = edges
    box = boxes.clip(Box(x0, y0, max(x1, x0 + 0.01), max(y1, y0 + 0.01)), width, height)
    return box if box is not None else Box(0, 0, width, height)


@settings(deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(4, 20), st.integers(1, 20), st.data())
def test_masks_agree_with_the_plain_chain(
    width: int, height: int, rows: int, columns: int, data: st.DataObject
) -> None:
    """Every size of image, box and logits, boxes at the border and below a pixel included."""
    box = data.draw(clipped_boxes(width, height))
    item = BoxItem(np.zeros((height, width, 3), dtype=np.uint8), box)
    logits = 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    (result,) = Predictor(Fixed(logits), crop_size=SIZE, mask_threshold=(0.3,)).predict([item])
    expected, borderline = plain_masks(logits, item, 0.3)
    got = masks.decode(result.counts, height, width).astype(bool)
    assert not np.any((got != expected) & ~borderline)
    assert result.area == got.sum()


def test_mean_probability_is_of_the_mask() -> None:
    item = BoxItem(photograph(40, 40), Box(10, 10, 30, 30))
    (sure,) = Predictor(Fixed(torch.full((8, 8), 3.0)), crop_size=SIZE).predict([item])
    (none,) = Predictor(Fixed(torch.full((8, 8), -9.0)), crop_size=SIZE).predict([item])
    assert sure.mean_probability == pytest.approx(torch.tensor(3.0).sigmoid().item(), abs=0.02)
    assert (none.area, none.mean_probability) == (0, 0.0)


def test_stability_is_the_share_of_pixels_that_another_threshold_keeps() -> None:
    ramp = torch.linspace(-3, 3, 32).repeat(32, 1)  # logits that rise from left to right
    item = BoxItem(photograph(96, 96), Box(0, 0, 96, 96))
    options = {"crop_size": SIZE, "mask_threshold": (0.5,), "margin_rate": (0.0, 0.0)}
    (soft,) = Predictor(Fixed(ramp), **options).predict([item])
    assert soft.stability == pytest.approx(0.5, abs=0.05)  # logits 1..3 of -1..3
    (steep,) = Predictor(Fixed(20 * ramp), **options).predict([item])
    assert steep.stability > 0.9
    (empty,) = Predictor(Fixed(ramp - 9), **options).predict([item])
    assert (empty.area, empty.stability) == (0, 0.0)
    options["mask_threshold"] = (0.0,)  # every pixel is in the mask, and none above the laxer threshold
    (faint,) = Predictor(Fixed(ramp - 20), **options).predict([item])
    assert (faint.area, faint.stability) == (96 * 96, 0.0)


def test_agreement_of_opinions() -> None:
    item = BoxItem(photograph(40, 40), Box(10, 10, 30, 30))
    yes, no = torch.full((8, 8), 9.0), torch.full((8, 8), -9.0)
    (alone,) = Predictor(Fixed(yes), crop_size=SIZE).predict([item])
    assert alone.agreement is None
    (same,) = Predictor(Fixed(yes), crop_size=SIZE, mix_with=Fixed(yes)).predict([item])
    assert same.agreement == pytest.approx(1.0)
    (other,) = Predictor(Fixed(yes), crop_size=SIZE, mix_with=Fixed(no)).predict([item])
    assert other.agreement == pytest.approx(0.0, abs=1e-3)


def test_further_windows_are_averaged() -> None:
    """Each window's probabilities, at the box's pixels; then one threshold."""
    item = BoxItem(photograph(90, 120), Box(33.3, 25.5, 80.2, 70.9))
    options = {"crop_size": SIZE, "mask_threshold": (0.5,)}
    several = Predictor(Brightness(), margin_rate=(0.6, 0.6), more_margins=(0.0, 1.5), **options)
    (result,) = several.predict([item])
    expected = []
    for margin in (0.6, 0.0, 1.5):
        one = Predictor(Brightness(), margin_rate=(margin, margin), **options)
        logits = one.run(one.prepare([item]))
        window = boxes.central_window(item.box, (margin, margin))
        rows, columns = crops.box_mask_axes(window, item.box, 120, 90, SIZE)
        crop = F.interpolate(logits[:, None], (SIZE, SIZE), mode="bilinear").sigmoid()
        crop *= torch.from_numpy(rows[:, None] * columns[None, :])
        whole = torch.zeros(300, 300)  # windows leave the image
        pasted = F.interpolate(crop, (window.height, window.width), mode="bilinear")[0, 0]
        whole[100 + window.y0 : 100 + window.y1, 100 + window.x0 : 100 + window.x1] = pasted
        expected.append(whole[100:190, 100:220])
    mean = torch.stack(expected).mean(0).numpy()
    pixels = boxes.outer_pixels(item.box, 120, 90)
    inside = np.zeros((90, 120), dtype=bool)
    inside[pixels.y0 : pixels.y1, pixels.x0 : pixels.x1] = True
    got = masks.decode(result.counts, 90, 120).astype(bool)
    borderline = np.abs(mean - 0.5) < 1e-4
    assert 0 < got.sum() < inside.sum()
    np.testing.assert_array_equal(got[~borderline], ((mean > 0.5) & inside)[~borderline])
    (alone,) = Predictor(Brightness(), **options).predict([item])
    assert alone.counts != result.counts


def test_the_mean_field_moves_a_mask_to_the_edge() -> None:
    """A mask that lies beside a bright square by two pixels lies better on it after refinement."""
    image = np.full((64, 64, 3), 40, dtype=np.uint8)
    image[16:48, 16:48] = 220
    item = BoxItem(image, Box(0, 0, 63, 63))  # its window is the image: a crop's pixel is an image's
    logits = torch.full((64, 64), -0.5)
    logits[18:50, 18:50] = 1.5
    options = {"crop_size": 64, "mask_threshold": (0.5,), "margin_rate": (0.0, 0.0)}
    truth = np.zeros((64, 64), dtype=bool)
    truth[16:48, 16:48] = True

    def agreement_with_truth(**more: object) -> float:
        (result,) = Predictor(Fixed(logits), **options, **more).predict([item])
        got = masks.decode(result.counts, 64, 64).astype(bool)
        return float((got & truth).sum() / (got | truth).sum())

    assert agreement_with_truth() < 0.8
    assert agreement_with_truth(crf=MeanFieldOptions(kernel_size=3, zeta=0.3, iterations=200)) > 0.95


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    item = BoxItem(photograph(90, 120), Box(3.3, 5.5, 110.2, 80.9))
    predict = Predictor(Brightness(), crop_size=SIZE).predict
    (whole,) = predict([item])
    monkeypatch.setattr(pasting, "STRIP_PIXELS", 100)
    (strips,) = predict([item])
    assert (strips.counts, strips.area) == (whole.counts, whole.area)
    assert strips.mean_probability == pytest.approx(whole.mean_probability, rel=1e-6)
    assert strips.stability == whole.stability


def crop_items() -> list[BoxItem]:
    """Boxes inside, at borders, with windows beyond the image, enlarged, reduced, and narrow."""
    image, large = photograph(60, 90), photograph(700, 300, seed=1)
    return [
        BoxItem(image, Box(20, 20, 50, 45)),
        BoxItem(image, Box(0, 0, 90, 60)),
        BoxItem(image, Box(85.5, 0, 90, 3)),
        BoxItem(image, Box(40, 0.2, 41, 60)),
        BoxItem(large, Box(0, 0, 300, 700)),
        BoxItem(large, Box(10, 10, 40, 690)),
        BoxItem(large, Box(2, 300, 298, 330)),
    ]


def denormalised(images: Tensor) -> np.ndarray:
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (255 * (images * std + mean)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [64, 200])
def test_crops_are_pillows(size: int) -> None:
    items = crop_items()
    batch = Predictor(Brightness(), crop_size=size).prepare(items)
    for pixels, item in zip(denormalised(batch.images), items, strict=True):
        plain = crops.resize(crops.cut(item.image, boxes.central_window(item.box)), size)
        np.testing.assert_allclose(pixels, plain, atol=1e-4)
    assert batch.areas.tolist() == [boxes.area(item.box) for item in items]


def test_windows_that_wrap_around_are_held_one_at_a_time() -> None:
    """They are copies: together those of a full batch of 12-megapixel images would be gigabytes."""
    items = [BoxItem(photograph(500, 600), Box(0, 0, 600, 500))] * 8
    window = boxes.central_window(items[0].box)
    prepare = Predictor(Brightness(), crop_size=SIZE).prepare
    prepare(items[:1])  # compiles the resize, if it can be
    tracemalloc.start()
    try:
        prepare(items)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 * (3 * window.width * window.height)


@pytest.mark.parametrize("largest", [0, 5000, predictor.LARGEST_UPLOAD])
def test_crops_of_a_gpu_are_near_pillows(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Torch's filter in floats, run on the CPU here; windows above ``largest`` pixels are resized first."""
    monkeypatch.setattr(predictor, "LARGEST_UPLOAD", largest)
    windows = [crops.cut(item.image, boxes.central_window(item.box)) for item in crop_items()]
    images = torch.empty(len(windows), 3, SIZE, SIZE)
    predictor._resize_into(images, windows)
    for image, window in zip(images, windows, strict=True):
        assert_near(image.permute(1, 2, 0).numpy(), crops.resize(window, SIZE))


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 200))
def test_resize_in_floats_is_near_pillows(height: int, width: int) -> None:
    """No window is narrower than 2 pixels, where torch 2.15's float resize on the CPU goes wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_near(predictor._resize(torch.from_numpy(pixels), SIZE).permute(1, 2, 0).numpy(), crops.resize(pixels, SIZE))


def assert_near(pixels: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(pixels.astype(np.float64) - expected)
    assert difference.max() < 2.01
    assert difference.mean() < 0.5


def test_read_only_images_are_accepted() -> None:
    """Ray hands out read-only arrays, which torch warns of."""
    image = photograph(50, 50)
    frozen = image.copy()
    frozen.flags.writeable = False
    box = Box(10, 10, 40, 40)
    predict = Predictor(Brightness(), crop_size=SIZE).predict
    assert predict([BoxItem(frozen, box)]) == predict([BoxItem(image, box)])


def test_a_box_gives_the_same_mask_alone_and_in_company() -> None:
    items = crop_items()
    predict = Predictor(Brightness(), crop_size=SIZE).predict
    assert predict(items) == [predict([item])[0] for item in items]


def test_logits_with_a_channel_are_accepted() -> None:
    items = crop_items()
    plain = Predictor(Brightness(), crop_size=SIZE).predict(items)
    assert Predictor(Brightness(keep_channel=True), crop_size=SIZE).predict(items) == plain


def test_flip_and_mix_are_means_of_logits() -> None:
    one, two = Brightness(0), Brightness(1)
    both = Predictor(one, crop_size=SIZE, flip=True, mix_with=two)
    batch = both.prepare(crop_items())
    mirrored = batch.images.flip(-1).contiguous()
    with torch.no_grad():
        parts = [net(batch.images, batch.areas) for net in (one, two)]
        parts += [net(mirrored, batch.areas).flip(-1) for net in (one, two)]
    torch.testing.assert_close(both.run(batch), torch.stack(parts).mean(0))


def test_threshold_per_band() -> None:
    """The same logits, probability about 0.5: only the band with a threshold below keeps its mask."""
    image = photograph(300, 300)
    items = [BoxItem(image, Box(50, 50, 50 + side, 50 + side)) for side in (20, 60, 150)]
    flat = Fixed(torch.zeros(8, 8))
    results = Predictor(flat, crop_size=SIZE, mask_threshold=(0.6, 0.1, 0.6)).predict(items)
    assert [result.area > 0 for result in results] == [False, True, False]


def test_bf16_changes_few_pixels() -> None:
    items = crop_items()
    exact = Predictor(nn_conv(), crop_size=SIZE, mask_threshold=(0.5,)).predict(items)
    rough = Predictor(nn_conv(), crop_size=SIZE, mask_threshold=(0.5,), precision="bf16").predict(items)
    for item, a, b in zip(items, exact, rough, strict=True):
        height, width = item.image.shape[:2]
        differ = masks.decode(a.counts, height, width) != masks.decode(b.counts, height, width)
        assert differ.sum() <= 0.05 * boxes.area(item.box) + 3


def nn_conv() -> nn.Module:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 1, 8, stride=4)

        def forward(self, images: Tensor, areas: Tensor) -> Tensor:
            logits = self.conv(images)
            assert torch.is_autocast_enabled("cpu") == (logits.dtype == torch.bfloat16)
            return 4 * logits

    return Conv()


def test_nothing_to_predict() -> None:
    assert Predictor(Brightness(), crop_size=SIZE).predict([]) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_threshold": (0.1, 0.2)}, "mask_thres"),
        ({"mask_threshold": (1.5,)}, "mask_thres"),
        ({"mask_threshold": ()}, "mask_thres"),
        ({"margin_rate": (-0.1, 0.6)}, "test_margin_rate"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_wrong_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        Predictor(Brightness(), crop_size=SIZE, **options)


@pytest.mark.shared
@pytest.mark.parametrize("which", ["seg_logits", "seg_logits_2"])
def test_masks_agree_with_the_reference(shared_dir: Path, which: str) -> None:
    """The peer's masks of the same logits, cut by the box, but for as many pixels as lie on the threshold."""
    stored = torch.load(shared_dir / "reference" / "crops.pt", weights_only=True)
    predict = Predictor(Fixed(stored[which][0, 0]), crop_size=512).predict
    for item in stored["items"]:
        height, width = item["image_hw"]
        box = boxes.clip(boxes.from_xywh(item["bbox_xywh"]), width, height)
        assert box is not None
        (result,) = predict([BoxItem(np.zeros((height, width, 3), dtype=np.uint8), box)])
        reference = item[f"paste_{which}"]
        expected = masks.decode(reference["rle"]["counts"], height, width)
        allowed = boxes.outer_pixels(box, width, height)
        outside = np.ones((height, width), dtype=bool)
        outside[allowed.y0 : allowed.y1, allowed.x0 : allowed.x1] = False
        expected[outside] = 0
        differ = np.count_nonzero(masks.decode(result.counts, height, width) != expected)
        assert differ <= reference["n_borderline_1e-5"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_agrees_with_the_cpu() -> None:
    items = crop_items()
    on_cpu, on_gpu = (Predictor(Brightness(), crop_size=SIZE, device=device) for device in ("cpu", "cuda"))
    batch, batch_gpu = on_cpu.prepare(items), on_gpu.prepare(items)
    assert np.abs(denormalised(batch.images) - denormalised(batch_gpu.images.cpu())).max() < 2.01
    logits = on_cpu.run(batch)
    for item, a, b in zip(items, on_cpu.finish(logits, batch), on_gpu.finish(logits.cuda(), batch_gpu), strict=True):
        height, width = item.image.shape[:2]
        differ = masks.decode(a.counts, height, width) != masks.decode(b.counts, height, width)
        assert differ.sum() <= 2
