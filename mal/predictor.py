"""Crops in, masks out: the one way to get a mask. Used by labelling, by evaluation and by validation during training.

    boxes --crops_of--> normalised crops --answer--> logits --masks_of--> RLEs

The three stages can run in threads of their own, so that the device never waits (`mal.labelling.pipeline`); on a GPU
each has a stream of its own, and what one hands to the next carries an event to wait for. `Predictor.predict` chains
them. Nothing here is the size of the image: a mask is computed for the pixels of its box alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

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
from mal.resizing import resize, resize_normalised

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

    def part(self, start: int, stop: int) -> Batch:
        """The boxes ``start..stop`` alone."""
        return Batch(self.images[start:stop], self.areas[start:stop], self.placements[start:stop])


@dataclass(frozen=True, slots=True)
class Crops:
    """Boxes on their way to the network: a batch for each of the predictor's margins, and when it is there."""

    batches: list[Batch]
    ready: torch.cuda.Event | None = None  # on a GPU: recorded after the last of the work that makes the batches

    def halves(self) -> list[Crops]:
        """The same boxes in two parts; they must be two at least."""
        count = len(self.batches[0].placements)
        assert count > 1
        return [
            Crops([batch.part(start, stop) for batch in self.batches], self.ready)
            for start, stop in ((0, count // 2), (count // 2, count))
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the network says of some crops."""

    crops: Crops
    logits: list[Tensor]  # for each batch: [B, h, w] float32
    agreement: Tensor | None  # [B], if there are several opinions
    ready: torch.cuda.Event | None = None


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
        self._streams: dict[str, torch.cuda.Stream] = {}
        if self.device.type == "cuda":
            self._streams = {stage: torch.cuda.Stream(self.device) for stage in ("crops", "masks")}

    def predict(self, items: Sequence[BoxItem]) -> list[MaskResult]:
        """The masks of ``items``, in their order, as one batch (the caller bounds its size)."""
        return self.masks_of(self.answer(self.crops_of(items))) if items else []

    def crops_of(self, items: Sequence[BoxItem]) -> Crops:
        """The first stage: what the network reads of ``items``, at least one. The images are not needed afterwards."""
        with self._on_stream("crops") as stream:
            batches = [self.prepare(items, margin) for margin in self.margins]
            return Crops(batches, _event(stream))

    def answer(self, crops: Crops) -> Answer:
        """The second stage: the network. On a GPU it returns before the device is done."""
        stream = self._wait_for(crops.ready, [batch.images for batch in crops.batches])
        logits, first = [], None
        for batch in crops.batches:
            views = self.views(batch)
            first = views if first is None else first
            logits.append(self.merge(views, batch))
        assert first is not None
        opinions = agreement(first) if len(first) > 1 else None
        return Answer(crops, logits, opinions, _event(stream))

    def masks_of(self, answer: Answer) -> list[MaskResult]:
        """The third stage: from logits to RLEs. It waits for the device."""
        with self._on_stream("masks"):
            tensors = [*answer.logits, *([] if answer.agreement is None else [answer.agreement])]
            self._wait_for(answer.ready, tensors)
            pasted = list(zip(answer.logits, answer.crops.batches, strict=True))
            results = self.finish(*pasted[0], *pasted[1:])
            if answer.agreement is None:
                return results
            agreed = answer.agreement.tolist()
            return [result._replace(agreement=value) for result, value in zip(results, agreed, strict=True)]

    @contextlib.contextmanager
    def _on_stream(self, stage: str) -> Iterator[torch.cuda.Stream | None]:
        """On a GPU: what the block starts goes into the stage's own stream."""
        stream = self._streams.get(stage)
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            yield stream

    def _wait_for(self, ready: torch.cuda.Event | None, tensors: Sequence[Tensor]) -> torch.cuda.Stream | None:
        """On a GPU: the current stream waits for ``ready`` before it reads ``tensors``, made in another one."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        if ready is not None:
            stream.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(stream)  # or their memory could be given away while they are read
        return stream

    def prepare(self, items: Sequence[BoxItem], margin: float | None = None) -> Batch:
        """Cut, resize and normalise (METHOD section 2). Needs no network: may run ahead in other threads.

        Windows are cut on the CPU, where that is a view or a short copy, and everything else happens on the device.
        Pixels are those of `mal.crops.resize`; on a GPU within 2/255.
        """
        size = self.crop_size
        areas = [area(item.box) for item in items]
        windows = [central_window(item.box, (self.margins[0] if margin is None else margin,) * 2) for item in items]
        for item in items:
            assert item.image.dtype == np.uint8, item.image.dtype
            assert item.image.ndim == 3, item.image.shape
        pixels = (crops.cut(item.image, window) for item, window in zip(items, windows, strict=True))
        images = torch.empty(len(items), 3, size, size, device=self.device)
        if images.device.type == "cpu":
            # One after the other: windows that wrap around are copies, each of them as large as its image.
            for image, source in zip(images, pixels, strict=True):
                resize_normalised(source, size, image.numpy())
        else:
            _resize_into(images, list(pixels))
            _normalise(images)
        placements = []
        for item, window, band in zip(items, windows, band_index(areas), strict=True):
            height, width = item.image.shape[:2]
            rows, columns = crops.box_mask_axes(window, item.box, width, height, size)
            inside = outer_pixels(item.box, width, height)
            placements.append(Placement(window, inside, rows, columns, height, width, self.thresholds[band]))
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


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """The moment up to which ``stream`` has got, to be waited for by others."""
    return None if stream is None else cast(torch.cuda.Event, stream.record_event())


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


def _resize_into(images: Tensor, pixels: Sequence[NDArray[np.uint8]]) -> None:
    """Windows ``[h, w, 3]`` resized into ``images`` ``[B, 3, S, S]`` on a GPU: whole values 0..255.

    They travel in one transfer from pinned memory, but for large ones, which are resized before they do.
    """
    size = images.shape[-1]
    small = [i for i, one in enumerate(pixels) if one.size <= 3 * LARGEST_UPLOAD]
    for i in set(range(len(pixels))).difference(small):
        images[i].copy_(torch.from_numpy(resize(pixels[i], size).transpose(2, 0, 1)))
    if small:
        packed = pack([pixels[i] for i in small], pinned=images.is_cuda).to(images.device, non_blocking=True)
        for i, part in zip(small, packed.split([pixels[i].size for i in small]), strict=True):
            images[i].copy_(_resize(part.view(pixels[i].shape), size))


def pack(pixels: Sequence[NDArray[np.uint8]], *, pinned: bool) -> Tensor:
    """The values of all arrays, one after the other, in one tensor; in pinned memory a copy of it needs no waiting."""
    packed = torch.empty(sum(one.size for one in pixels), dtype=torch.uint8, pin_memory=pinned)
    place = 0
    for one in pixels:
        packed[place : place + one.size].numpy().reshape(one.shape)[...] = one
        place += one.size
    return packed


def _resize(pixels: Tensor, size: int) -> Tensor:
    """`mal.crops.resize` by torch, for GPUs: uint8 ``[h, w, 3]`` to whole values 0..255, ``[3, size, size]``."""
    height, width = pixels.shape[:2]
    planes = pixels.permute(2, 0, 1)[None].to(torch.float32, memory_format=torch.contiguous_format)
    between = (size, width) if crops.vertical_first(height, width, size) else (height, size)
    return _filter(_filter(planes, between), (size, size))[0]


def _filter(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize of ``[1, 3, h, w]`` to ``shape``, rounded and cut as Pillow does after each axis."""
    return F.interpolate(planes, shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)


def _normalise(images: Tensor) -> None:
    """0..255 to ImageNet's mean 0 and deviation 1, in place; ``[B, 3, S, S]``."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    images.mul_(1 / (255 * std)).sub_(mean / std)
