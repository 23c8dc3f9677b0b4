"""Crops in, masks out: the one way to get a mask. Used by labelling, by evaluation and by validation during training.

    boxes --prepare--> normalised crops --run--> logits --finish--> RLEs

The three stages can run in threads of their own, so that the device never waits (`Predictor.predict` chains them).
Nothing here is the size of the image: a mask is computed for the pixels of its box alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mal import crops
from mal.boxes import BANDS, Box, area, band_index, central_window, outer_pixels
from mal.crops import IMAGENET_MEAN, IMAGENET_STD
from mal.errors import SpecError
from mal.model.losses import MeanFieldOptions
from mal.model.refinement import refined_logits
from mal.pasting import MaskResult, Placement, paste

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_UPLOAD = 1 << 24
"""Windows of more pixels than this are resized on the CPU, in uint8: as floats they could fill a device's memory."""


@dataclass(frozen=True, slots=True)
class BoxItem:
    """One box to label.

    Attributes:
        image: the decoded image, uint8 RGB ``[H, W, 3]``; shared by all boxes of the image.
        box: clipped to the image (`mal.boxes.clip`); window, box mask, area and band come from it.
    """

    image: NDArray[np.uint8]
    box: Box


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
        more_margins: margins of further windows around every box, whose probabilities are averaged with the first's.
        device: of the network, the crops' resize and the masks' threshold.
        precision: the network's; ``bf16`` and ``fp16`` use autocast. The masks are always computed in fp32.
        flip: also look at the mirrored crop, and take the mean of both logits.
        mix_with: a second network (the teacher); the mean of both networks' logits is taken.
        crf: refine the masks by the mean field, along the colour edges of the crop.

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
        more_margins: Sequence[float] = (),
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        flip: bool = False,
        mix_with: nn.Module | None = None,
        crf: MeanFieldOptions | None = None,
    ) -> None:
        if len(mask_threshold) not in (1, len(BANDS)):
            raise SpecError(f"train.mask_thres: {list(mask_threshold)} must hold one value, or one each for {BANDS}.")
        if not all(0 <= value < 1 for value in mask_threshold):
            raise SpecError(f"train.mask_thres: {list(mask_threshold)} must lie in [0, 1).")
        self.margins = (margin_rate[0], *more_margins)
        if min(self.margins) < 0:
            raise SpecError(f"train.test_margin_rate: {list(self.margins)} must not be negative.")
        if precision not in _AUTOCAST:
            raise SpecError(f"precision: {precision!r} is not one of {', '.join(_AUTOCAST)}.")
        self.crop_size = crop_size
        self.crf = crf
        self.thresholds = tuple(mask_threshold) * (len(BANDS) // len(mask_threshold))
        self.device = torch.device(device)
        self.dtype = _AUTOCAST[precision]
        self.flip = flip
        self.networks = [net.to(self.device).eval() for net in (network, mix_with) if net is not None]

    def predict(self, items: Sequence[BoxItem]) -> list[MaskResult]:
        """The masks of ``items``, in their order, as one batch (the caller bounds its size)."""
        if not items:
            return []
        found = []
        for margin in self.margins:
            batch = self.prepare(items, margin)
            found.append((batch, self.views(batch)))
        pasted = [(self.merge(views, batch), batch) for batch, views in found]
        results = self.finish(*pasted[0], *pasted[1:])
        views = found[0][1]
        if len(views) == 1:
            return results
        return [result._replace(agreement=a) for result, a in zip(results, agreement(views).tolist(), strict=True)]

    def prepare(self, items: Sequence[BoxItem], margin: float | None = None) -> Batch:
        """Cut, resize and normalise (METHOD section 2). Needs no network: may run ahead in other threads.

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
            window = central_window(item.box, (self.margins[0] if margin is None else margin,) * 2)
            source = _upload(crops.cut(item.image, window), self.device)
            image.copy_(_resize(source, size, whole=source.device.type == "cpu"))
            rows, columns = crops.box_mask_axes(window, item.box, width, height, size)
            pixels = outer_pixels(item.box, width, height)
            placements.append(Placement(window, pixels, rows, columns, height, width, self.thresholds[band]))
        _normalise(images)
        return Batch(images, torch.tensor(areas, dtype=torch.float64), placements)

    def run(self, batch: Batch) -> Tensor:
        """The logits ``[B, h, w]``, float32 on the device: the mean over networks and mirrored views, or refined."""
        return self.merge(self.views(batch), batch)

    @torch.no_grad()
    def merge(self, views: Tensor, batch: Batch) -> Tensor:
        """The mean of ``views`` [V, B, h, w] of a batch, refined by the mean field if that is asked for."""
        logits = views.mean(0)
        if self.crf is None:
            return logits
        box_mask = np.stack([place.rows[:, None] * place.columns[None, :] for place in batch.placements])
        return refined_logits(logits, batch.images, torch.from_numpy(box_mask).to(logits.device), self.crf)

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
    def finish(self, logits: Tensor, batch: Batch, *views: tuple[Tensor, Batch]) -> list[MaskResult]:
        """Logits to masks (METHOD section 5), cut by the box rounded outwards.

        Args:
            logits: ``[B, h, w]``, what `run` gave for ``batch``.
            views: the same of other windows around the same boxes; the mean of the probabilities is thresholded.
        """
        return paste([(logits, batch.placements), *((more, other.placements) for more, other in views)])


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
