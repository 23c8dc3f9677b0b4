"""Crops in, masks out: the one way to get a mask. Used by labelling, by evaluation and by validation during training.

    boxes --prepare--> normalised crops --run--> logits --finish--> RLEs

The three stages can run in threads of their own, so that the device never waits (`Predictor.predict` chains them).
Nothing here is the size of the image: a mask is computed for the pixels of its box alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mal import crops, masks
from mal.boxes import BANDS, Box, Window, area, band_index, central_window, outer_pixels
from mal.errors import SpecError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_UPLOAD = 1 << 24
"""Windows of more pixels than this are resized on the CPU, in uint8: as floats they could fill a device's memory."""
STABILITY_OFFSET = 1.0
"""The stability of a mask is measured between thresholds this much above and below its own, in logits."""
STRIP_PIXELS = 1 << 22
"""Probabilities of one box are held for at most about this many pixels at a time."""


@dataclass(frozen=True, slots=True)
class BoxItem:
    """One box to label.

    Attributes:
        image: the decoded image, uint8 RGB ``[H, W, 3]``; shared by all boxes of the image.
        box: clipped to the image (`mal.boxes.clip`); window, box mask, area and band come from it.
    """

    image: NDArray[np.uint8]
    box: Box


class MaskResult(NamedTuple):
    """The mask of one box."""

    counts: str  # compressed COCO RLE of the image-sized mask
    area: int  # mask pixels
    mean_probability: float  # of the mask's pixels, 0..1; 0 for an empty mask
    stability: float  # IoU of the masks at a stricter and at a laxer threshold (`STABILITY_OFFSET`); 0 for an empty one
    agreement: float | None = None  # of the networks and mirrored views, 0..1, if there are several (`agreement`)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the mask of one crop belongs."""

    window: Window
    pixels: Window  # the box rounded outwards: no mask pixel outside
    rows: NDArray[np.uint8]  # box mask of the crop = rows x columns, each [S], 0 or 1
    columns: NDArray[np.uint8]
    height: int  # of the image
    width: int
    threshold: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What the network reads, and what is needed to put its answer back into the images."""

    images: Tensor  # [B, 3, S, S] float32, normalised, contiguous, on the device
    areas: Tensor  # [B] float64, box areas in px^2; on the CPU, where the network reads them
    placements: list[Placement]


class Predictor:
    """Masks for boxes, by one network or the mean of two.

    The networks are moved to ``device`` and put into eval mode; training code that lends its network calls ``train()``
    on it afterwards.

    Args:
        network: ``network(images [B, 3, S, S], areas [B]) -> logits [B, h, w]`` or ``[B, 1, h, w]``.
        crop_size: S, a multiple of the backbone's patch size.
        mask_threshold: a pixel belongs to the mask if its probability is above; one value, or one per band (small,
            medium, large).
        margin_rate: `mal.boxes.central_window`; not negative.
        device: of the network, the crops' resize and the masks' threshold.
        precision: the network's; ``bf16`` and ``fp16`` use autocast. The masks are always computed in fp32.
        flip: also look at the mirrored crop, and take the mean of both logits.
        mix_with: a second network (the teacher); the mean of both networks' logits is taken.

    Raises:
        SpecError: an option has a value that is not allowed.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        crop_size: int,
        mask_threshold: Sequence[float] = (0.1,),
        margin_rate: Sequence[float] = (0.6, 0.6),
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        flip: bool = False,
        mix_with: nn.Module | None = None,
    ) -> None:
        if len(mask_threshold) not in (1, len(BANDS)):
            raise SpecError(f"train.mask_thres: {list(mask_threshold)} must hold one value, or one each for {BANDS}.")
        if not all(0 <= value < 1 for value in mask_threshold):
            raise SpecError(f"train.mask_thres: {list(mask_threshold)} must lie in [0, 1).")
        if margin_rate[0] < 0:
            raise SpecError(f"train.test_margin_rate: {list(margin_rate)} must not be negative.")
        if precision not in _AUTOCAST:
            raise SpecError(f"precision: {precision!r} is not one of {', '.join(_AUTOCAST)}.")
        self.crop_size = crop_size
        self.margin_rate = tuple(margin_rate)
        self.thresholds = tuple(mask_threshold) * (len(BANDS) // len(mask_threshold))
        self.device = torch.device(device)
        self.dtype = _AUTOCAST[precision]
        self.flip = flip
        self.networks = [net.to(self.device).eval() for net in (network, mix_with) if net is not None]

    def predict(self, items: Sequence[BoxItem]) -> list[MaskResult]:
        """The masks of ``items``, in their order, as one batch (the caller bounds its size)."""
        if not items:
            return []
        batch = self.prepare(items)
        views = self.views(batch)
        results = self.finish(views.mean(0), batch)
        if len(views) == 1:
            return results
        return [result._replace(agreement=a) for result, a in zip(results, agreement(views).tolist(), strict=True)]

    def prepare(self, items: Sequence[BoxItem]) -> Batch:
        """Cut, resize and normalise (REFERENCE section 2). Needs no network: may run ahead in other threads.

        Windows are cut on the CPU, where that is a view or a short copy, and everything else happens on the device.
        Pixels agree with `mal.crops.resize` within 2/255.
        """
        size = self.crop_size
        areas = [area(item.box) for item in items]
        images = torch.empty(len(items), 3, size, size, device=self.device)
        placements = []
        for item, band, image in zip(items, band_index(areas), images, strict=True):
            assert item.image.dtype == np.uint8, item.image.dtype
            assert item.image.ndim == 3, item.image.shape
            height, width = item.image.shape[:2]
            window = central_window(item.box, self.margin_rate)
            source = _upload(crops.cut(item.image, window), self.device)
            image.copy_(_resize(source, size, whole=source.device.type == "cpu"))
            rows, columns = crops.box_mask_axes(window, item.box, width, height, size)
            pixels = outer_pixels(item.box, width, height)
            placements.append(Placement(window, pixels, rows, columns, height, width, self.thresholds[band]))
        _normalise(images)
        return Batch(images, torch.tensor(areas, dtype=torch.float64), placements)

    def run(self, batch: Batch) -> Tensor:
        """The logits ``[B, h, w]``, float32 on the device: the mean over networks and mirrored views asked for."""
        return self.views(batch).mean(0)

    @torch.no_grad()  # not inference_mode: FSDP2 reuses in training the buffers that it gathers here
    def views(self, batch: Batch) -> Tensor:
        """The logits of every network, then of the mirrored views: ``[V, B, h, w]``, float32 on the device."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            views = [_logits(net, batch.images, batch.areas) for net in self.networks]
            if self.flip:
                mirrored = batch.images.flip(-1)
                views += [_logits(net, mirrored, batch.areas).flip(-1) for net in self.networks]
        return torch.stack(views)

    @torch.no_grad()
    def finish(self, logits: Tensor, batch: Batch) -> list[MaskResult]:
        """Logits to masks (REFERENCE section 5), cut by the box rounded outwards.

        Bilinear to the crop, sigmoid, times box mask, bilinear to the window, threshold: every step for the pixels
        that the box's pixels depend on, and no other. The device is waited for once.

        Args:
            logits: ``[B, h, w]``, what `run` gave for ``batch``.
        """
        vectors = [axis for place in batch.placements for axis in _axes(place, *logits.shape[1:])]
        vectors = _to_device(vectors, logits.device)
        pieces: list[Tensor] = []
        sums: list[Tensor] = []
        for i, place in enumerate(batch.placements):
            strips = list(_strips(logits[i], vectors[2 * i], vectors[2 * i + 1], place.threshold))
            pieces += [mask.flatten() for mask, _ in strips]
            sums.append(torch.stack([total for _, total in strips]).sum(0))
        packed = torch.cat(pieces).cpu().numpy()
        totals = torch.stack(sums).tolist()
        return list(_encode(packed, totals, batch.placements))


class _Axis(NamedTuple):
    """One axis of one box: ``p`` pixels of the box depend on ``n`` of the crop's, and those on the logits.

    Both steps are linear interpolations between two neighbours, as in ``F.interpolate(mode="bilinear")``.
    """

    low: Tensor  # [n] index of each crop pixel's first logit
    high: Tensor  # [n] and of its second
    share: Tensor  # [n] weight of the second; the first has the rest
    crop_low: Tensor  # [p] index of each box pixel's first crop pixel, among the n
    crop_high: Tensor  # [p] and of its second
    weight_low: Tensor  # [p] weight of the first times its box mask
    weight_high: Tensor  # [p] and of the second


def _axis(first: int, stop: int, length: int, box_mask: NDArray[np.uint8], logits: int) -> _Axis:
    """The interpolations for pixels ``first..stop`` of a window of ``length``; its crop has ``box_mask``'s length."""
    size = len(box_mask)
    low, high, share = _neighbours(np.arange(first, stop), size, length)
    needed = np.zeros(size, dtype=bool)
    needed[low] = needed[high] = True
    rank = np.cumsum(needed) - 1
    logit_low, logit_high, logit_share = _neighbours(np.flatnonzero(needed), logits, size)
    weight_low, weight_high = (1 - share) * box_mask[low], share * box_mask[high]
    indices = (logit_low, logit_high, rank[low], rank[high])
    a, b, c, d = (torch.from_numpy(index) for index in indices)
    u, v, w = (torch.from_numpy(weight.astype(np.float32)) for weight in (logit_share, weight_low, weight_high))
    return _Axis(a, b, u, c, d, v, w)


def _axes(place: Placement, logits_height: int, logits_width: int) -> tuple[_Axis, _Axis]:
    """Rows and columns of one box."""
    window, pixels = place.window, place.pixels
    rows = _axis(pixels.y0 - window.y0, pixels.y1 - window.y0, window.height, place.rows, logits_height)
    columns = _axis(pixels.x0 - window.x0, pixels.x1 - window.x0, window.width, place.columns, logits_width)
    return rows, columns


def _neighbours(
    position: NDArray[np.int64], source: int, target: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Bilinear resize of ``source`` values to ``target``: the two sources of each position, and the second's weight.

    Pixel centres lie at half-integers and borders are repeated (``align_corners=False``).
    """
    centre = np.maximum((position + 0.5) * (source / target) - 0.5, 0.0)
    low = np.minimum(centre.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), centre - low


def _to_device(axes: Sequence[_Axis], device: torch.device) -> list[_Axis]:
    """All vectors in two transfers."""
    if device.type == "cpu":
        return list(axes)
    flat = [tensor for axis in axes for tensor in axis]
    moved: dict[int, Tensor] = {}
    for floating in (False, True):
        chosen = [i for i, tensor in enumerate(flat) if tensor.is_floating_point() == floating]
        together = torch.cat([flat[i] for i in chosen]).to(device)
        moved |= zip(chosen, together.split([len(flat[i]) for i in chosen]), strict=True)
    fields = len(_Axis._fields)
    return [_Axis(*(moved[i] for i in range(start, start + fields))) for start in range(0, len(flat), fields)]


def _strips(logits: Tensor, rows: _Axis, columns: _Axis, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The box's mask, some columns at a time: bool ``[columns, rows]`` (an RLE runs down the columns), and ``[3]``: the
    sum of the mask's probabilities, and the pixels above a stricter and above a laxer threshold.

    Rows are interpolated by copying whole rows, which is fast, and columns as the rows of the transposed map. The box
    mask is a product of rows and columns, so it is part of the second interpolation's weights.
    """
    across = _interpolate(logits.t(), columns)  # [n columns, logits]
    crop = _interpolate(across.t(), rows).sigmoid_()  # [n rows, n columns]
    down = _interpolate_masked(crop, rows.crop_low, rows.crop_high, rows.weight_low, rows.weight_high).t().contiguous()
    step = max(1, STRIP_PIXELS // down.shape[1])
    strict, lax = stability_thresholds(threshold)
    strips = zip(*(vector.split(step) for vector in columns[3:]), strict=True)
    for crop_low, crop_high, weight_low, weight_high in strips:
        probability = _interpolate_masked(down, crop_low, crop_high, weight_low, weight_high)
        counts = [torch.count_nonzero(probability > other) for other in (strict, lax)]
        total = F.threshold(probability, threshold, 0.0).sum(dtype=torch.float64)
        yield probability > threshold, torch.stack([total, *counts])


def _interpolate(values: Tensor, axis: _Axis) -> Tensor:
    """Logits ``[l, m]`` to the needed crop pixels ``[n, m]``."""
    return torch.lerp(values.index_select(0, axis.low), values.index_select(0, axis.high), axis.share[:, None])


def _interpolate_masked(values: Tensor, low: Tensor, high: Tensor, weight_low: Tensor, weight_high: Tensor) -> Tensor:
    """Probabilities ``[n, m]`` of the crop to the box's pixels ``[p, m]``."""
    first = values.index_select(0, low).mul_(weight_low[:, None])
    return first.addcmul_(values.index_select(0, high), weight_high[:, None])


def stability_thresholds(threshold: float) -> tuple[float, float]:
    """The stricter and the laxer threshold around one in [0, 1)."""
    logit = math.log(max(threshold, 1e-3) / (1 - max(threshold, 1e-3)))
    strict, lax = (1 / (1 + math.exp(-(logit + offset))) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return strict, lax


def _encode(
    packed: NDArray[np.bool_], totals: Sequence[Sequence[float]], places: Sequence[Placement]
) -> Iterator[MaskResult]:
    """RLEs from the masks of all boxes, one after the other, each in column-major order."""
    start = 0
    for place, (total, strict, lax) in zip(places, totals, strict=True):
        pixels = place.pixels
        stop = start + pixels.width * pixels.height
        mask = packed[start:stop].reshape(pixels.width, pixels.height).T
        start = stop
        count = int(np.count_nonzero(mask))
        counts = masks.encode(mask, pixels, place.height, place.width)
        yield MaskResult(counts, count, total / count if count else 0.0, strict / lax if count else 0.0)


def agreement(views: Tensor) -> Tensor:
    """How far several opinions agree: sum of the least probabilities over sum of the greatest, per box.

    Args:
        views: logits ``[V, B, h, w]``.

    Returns:
        ``[B]`` in 0..1; the IoU, if all probabilities are 0 or 1.
    """
    least, greatest = views.amin(0).sigmoid(), views.amax(0).sigmoid()
    return least.sum((1, 2)) / greatest.sum((1, 2)).clamp_min(1e-6)


def _logits(network: nn.Module, images: Tensor, areas: Tensor) -> Tensor:
    """The network's answer as float32 ``[B, h, w]``."""
    logits: Tensor = network(images, areas)
    return (logits[:, 0] if logits.ndim == 4 else logits).float()


def _upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Pixels ``[h, w, 3]`` as a tensor where they are to be resized."""
    if not pixels.flags.writeable:  # Ray's arrays are read-only, which torch warns of
        pixels = pixels.copy()
    tensor = torch.from_numpy(pixels)
    fits = device.type == "cuda" and tensor.shape[0] * tensor.shape[1] <= LARGEST_UPLOAD
    return tensor.to(device) if fits else tensor


def _resize(pixels: Tensor, size: int, whole: bool) -> Tensor:
    """`mal.crops.resize` by torch: uint8 ``[h, w, 3]`` to whole values 0..255, ``[3, size, size]``.

    Args:
        whole: compute in uint8, which torch can on the CPU, four times faster than Pillow. Else in floats, rounded
            after each axis as Pillow does.
    """
    height, width = pixels.shape[:2]
    planes = pixels.permute(2, 0, 1)[None]
    if not whole:
        planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
    if crops.vertical_first(height, width, size):
        planes = _filter(planes, (size, width), whole)
    elif not whole:  # one call for both axes would not round between them
        planes = _filter(planes, (height, size), whole)
    return _filter(planes, (size, size), whole)[0]


def _filter(planes: Tensor, shape: tuple[int, int], whole: bool) -> Tensor:
    """Antialiased bicubic resize of ``[1, 3, h, w]`` to ``shape``."""
    if whole:
        return F.interpolate(planes, shape, mode="bicubic", antialias=True)
    return F.interpolate(planes, shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)


def _normalise(images: Tensor) -> None:
    """0..255 to ImageNet's mean 0 and deviation 1, in place; ``[B, 3, S, S]``."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    images.mul_(1 / (255 * std)).sub_(mean / std)
