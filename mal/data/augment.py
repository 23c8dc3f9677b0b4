"""The two views of a training crop: the teacher's is clean, the student's has its colours and sharpness changed.

Everything random comes from the generator handed in, never from a global state (`sample_generator`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional

from mal.crops import IMAGENET_MEAN, IMAGENET_STD

FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.5
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
"""Half-width of each factor's range; about 1, but for the hue, a shift in parts of the circle, about 0."""
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_RADIUS = (0.1, 2.0)


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


def student_view(pixels: NDArray[np.uint8], rng: np.random.Generator, strength: float = 1.0) -> NDArray[np.uint8]:
    """Colour jitter, greyscale and Gaussian blur, each with its probability (METHOD section 2).

    Args:
        pixels: RGB ``[S, S, 3]``, left as it is.
        rng: decides on what is done and how much of it.
        strength: factor on the jitter's ranges, on the probability of greyscale and on the blur's radius, 0..1.

    Returns:
        RGB ``[S, S, 3]``; ``pixels`` itself if nothing was to be done.
    """
    if strength == 0:
        return pixels
    jitter, grey, blur = rng.random(3) < (JITTER_PROBABILITY, GREY_PROBABILITY * strength, BLUR_PROBABILITY)
    if not (jitter or grey or blur):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if jitter:
        image = _jittered(image, rng, strength)
    if grey:
        image = image.convert("L").convert("RGB")
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(strength * float(rng.uniform(*BLUR_RADIUS))))
    return np.asarray(image)


def _jittered(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    changes = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation,
        "hue": functional.adjust_hue,
    }
    for name in rng.permutation(list(JITTER)):
        middle = 0.0 if name == "hue" else 1.0
        reach = strength * JITTER[name]
        image = changes[name](image, float(rng.uniform(middle - reach, middle + reach)))
    return image


def normalised(pixels: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 ``[S, S, 3]`` to float32 ``[3, S, S]``: scaled to 0..1, then ImageNet's mean and deviation."""
    scale = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)
    shift = (np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    planes *= scale[:, None, None]
    planes -= shift[:, None, None]
    return torch.from_numpy(planes)
