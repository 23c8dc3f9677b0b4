"""The two views of a training crop: the teacher's is clean, the student's has its colours and sharpness changed.

What is random is drawn where a crop is loaded, from the generator handed in, never from a global state
(`sample_generator`). What was drawn travels with the crop, and the pixels are changed in batches on the training
device: there it costs little, and the processes that load only have to decode, cut and resize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mal.crops import IMAGENET_MEAN, IMAGENET_STD

FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.5
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
"""Half-width of each factor's range; about 1, but for the hue, a shift in parts of the circle, about 0."""
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_RADIUS = (0.1, 2.0)
"""Standard deviation of the Gaussian, in pixels of the crop."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value."""

GREY, RADIUS, ORDER, AMOUNT, CHANGE = 0, 1, 2, 6, 10
"""A change is ``[CHANGE]`` float32: at GREY 0 or 1, at RADIUS that of the blur (0: none), from ORDER on the four parts
of the jitter in the order in which they are made (places in JITTER; -1: none), from AMOUNT on how much of each."""
_NAMES = tuple(JITTER)
Change = Callable[[Tensor, Tensor], Tensor]
_HUE = _NAMES.index("hue")


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample of one epoch: the same on every worker, in every order. All numbers from 0 on."""
    return np.random.default_rng((seed, epoch, index))


def flip(
    pixels: NDArray[np.uint8], box_mask: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Mirror crop ``[S, S, 3]`` and box mask ``[S, S]`` left to right, both or neither, with probability 1/2."""
    if rng.random() < FLIP_PROBABILITY:
        return pixels[:, ::-1], box_mask[:, ::-1]
    return pixels, box_mask


def draw_change(rng: np.random.Generator, strength: float = 1.0) -> NDArray[np.float32]:
    """What is done to the student's view: jitter, greyscale and blur, each with its probability (METHOD section 2).

    Args:
        rng: decides on what is done and how much of it.
        strength: factor on the jitter's ranges, on the probability of greyscale and on the blur's radius, 0..1.
    """
    change = np.zeros(CHANGE, np.float32)
    change[ORDER:AMOUNT] = -1
    if strength == 0:
        return change
    jitter, grey, blur = rng.random(3) < (JITTER_PROBABILITY, GREY_PROBABILITY * strength, BLUR_PROBABILITY)
    if jitter:
        for place, part in enumerate(rng.permutation(len(_NAMES))):
            middle, width = float(part != _HUE), strength * JITTER[_NAMES[part]]
            change[ORDER + place] = part
            change[AMOUNT + place] = rng.uniform(middle - width, middle + width)
    change[GREY] = grey
    if blur:
        change[RADIUS] = strength * rng.uniform(*BLUR_RADIUS)
    return change


@torch.no_grad()
def views(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What a training step takes (`mal.training.step.Batch`), of a batch of `mal.data.training_set.Sample`.

    Args:
        batch: of a loader, on the CPU; ``crop`` [B, 3, S, S] uint8, ``change`` [B, CHANGE], ``area`` and ``id`` [B].
        device: where the pixels go, and are changed.
    """
    crop = batch["crop"].to(device, non_blocking=True)
    return {
        "image": normalised(student_view(crop, batch["change"])),
        "teacher_image": normalised(crop),
        "box_mask": batch["box_mask"].to(device, non_blocking=True),
        "area": batch["area"],
        "id": batch["id"],
    }


def normalised(pixels: Tensor) -> Tensor:
    """RGB 0..255 ``[..., 3, S, S]``, of any type, to float32: scaled to 0..1, then ImageNet's mean and deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=pixels.device)[:, None, None]
    return pixels.float().mul(1 / (255 * std)).sub_(mean / std)


def student_view(crops: Tensor, changes: Tensor) -> Tensor:
    """Jitter, greyscale and blur, as drawn.

    Args:
        crops: RGB ``[B, 3, S, S]``, uint8; left as they are.
        changes: ``[B, CHANGE]`` on the CPU, where they decide what is computed at all.

    Returns:
        RGB 0..255 ``[B, 3, S, S]``: float32, not rounded in between.
    """
    view = crops.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for place in range(len(_NAMES)):
        parts, amounts = changes[:, ORDER + place], changes[:, AMOUNT + place]
        for number, name in enumerate(_NAMES):
            _apply(view, (parts == number).nonzero()[:, 0], amounts, _PARTS[name])
    _apply(view, changes[:, GREY].nonzero()[:, 0], torch.zeros(len(changes)), _saturated)
    _apply(view, changes[:, RADIUS].nonzero()[:, 0], changes[:, RADIUS], _blurred)
    return view


def _apply(view: Tensor, members: Tensor, amounts: Tensor, change: Change) -> None:
    """Replace the ``members`` of ``view`` by what ``change`` makes of them and of their amounts."""
    if not len(members):
        return
    if view.device.type == "cpu":  # no kernels to be started: one after the other stays in the cache
        for k in members.tolist():
            view[k : k + 1] = change(view[k : k + 1], amounts[k : k + 1])
        return
    chosen = members.to(view.device, non_blocking=True)
    view[chosen] = change(view[chosen], amounts[members].to(view.device, non_blocking=True))


def _column(amounts: Tensor) -> Tensor:
    return amounts[:, None, None, None]


def _grey(x: Tensor) -> Tensor:
    """``[n, 3, S, S]`` -> ``[n, 1, S, S]``."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _brightened(x: Tensor, factors: Tensor) -> Tensor:
    return (x * _column(factors)).clamp_(0, 255)


def _contrasted(x: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, the mean grey of the crop."""
    mean = _grey(x.mean(dim=(2, 3), keepdim=True))
    return torch.lerp(mean, x, _column(factors)).clamp_(0, 255)


def _saturated(x: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, the grey of each pixel."""
    return torch.lerp(_grey(x), x, _column(factors)).clamp_(0, 255)


def _turned(x: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue by parts of the circle, at equal value and saturation (HSV)."""
    red, green, blue = x.unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    scale = chroma.clamp_min(1e-3).reciprocal_()  # grey has no hue: any will do
    hue = torch.where(high == green, (blue - red).mul_(scale).add_(2.0), (red - green).mul_(scale).add_(4.0))
    hue = torch.where(high == red, (green - blue).mul_(scale), hue)  # in sixths of the circle
    hue += 6.0 * shifts[:, None, None]
    hue -= 6.0 * torch.floor(hue / 6.0)
    parts = ((hue - 3.0).abs_().sub_(1.0), 2.0 - (hue - 2.0).abs_(), 2.0 - (hue - 4.0).abs_())
    return torch.stack([torch.addcmul(low, chroma, part.clamp_(0.0, 1.0)) for part in parts], dim=1)


def _blurred(x: Tensor, radii: Tensor) -> Tensor:
    """Gaussian blur, one axis after the other; beyond the border the outermost pixels are repeated."""
    reach = int(np.ceil(3 * BLUR_RADIUS[1])) if radii.device.type != "cpu" else int(torch.ceil(3 * radii.max()))
    steps = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-steps.square() / (2 * radii[:, None].square()))
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    planes = x.reshape(1, -1, *x.shape[-2:])
    for weight, padding in ((weights[..., None], (0, 0, reach, reach)), (weights[:, :, None], (reach, reach, 0, 0))):
        planes = F.conv2d(F.pad(planes, padding, mode="replicate"), weight, groups=planes.shape[1])
    return planes.view_as(x)


_PARTS: dict[str, Change] = {
    "brightness": _brightened,
    "contrast": _contrasted,
    "saturation": _saturated,
    "hue": _turned,
}
