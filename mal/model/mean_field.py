"""Mean-field refinement of masks: snaps a mask to the colour edges of its crop (METHOD section 4).

For pixel i and each neighbour j of its k x k window: ``K_ij = exp(-|I_i - I_j|^2 / (2 zeta^2))``, 0 outside the image.
Iterated from the clamped probabilities q: ``m0 = sum_j K_ij * -log(1 - q_j)``, ``m1 = sum_j K_ij * -log(q_j)``,
``a0 = exp(-m0)``, ``a1 = exp(-m1) * box``, ``q = clamp(a1 / (1e-6 + a0 + a1))``.

K is computed once and is symmetric, so only one of each pair of opposite neighbours is stored. There are three ways to
compute the same: a compiled loop on CPUs (`mal.model.mean_field_cpu`), a Triton kernel on NVIDIA's GPUs
(`mal.model.mean_field_gpu`), and plain torch for everything else, which the tests compare the others with.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

Slices = tuple[slice, slice]
EPSILON = 1e-6


@torch.no_grad()
def refine(
    image: Tensor,
    probabilities: Tensor,
    box_mask: Tensor | None,
    *,
    kernel_size: int = 3,
    zeta: float = 0.1,
    iterations: int = 100,
    low: float = 0.1,
    high: float = 0.9,
) -> Tensor:
    """The refined masks: where the converged probability is above one half.

    Args: as `mean_field`.

    Returns:
        [B, H, W], float32, values 0 and 1. No gradient.
    """
    q = mean_field(
        image, probabilities, box_mask, kernel_size=kernel_size, zeta=zeta, iterations=iterations, low=low, high=high
    )
    return (q > 0.5).float()


@torch.no_grad()
def mean_field(
    image: Tensor,
    probabilities: Tensor,
    box_mask: Tensor | None,
    *,
    kernel_size: int = 3,
    zeta: float = 0.1,
    iterations: int = 100,
    low: float = 0.1,
    high: float = 0.9,
) -> Tensor:
    """Probabilities after ``iterations`` of the mean field, computed in float32 whatever comes in.

    Args:
        image: [B, C, H, W], normalised colours, of the size of the probabilities.
        probabilities: [B, H, W] in [0, 1].
        box_mask: [B, H, W] in [0, 1], 1 inside the box; None for no box.
        kernel_size: side of the neighbourhood in pixels, odd.
        zeta: scale of colour differences (normalised units).
        low, high: the probabilities are kept within these.

    Returns:
        [B, H, W], float32, in [low, high]. No gradient.
    """
    assert kernel_size % 2 == 1, f"the neighbourhood needs a centre: {kernel_size}"
    way = plain
    if probabilities.numel() and 0.0 < low <= high < 1.0:  # the compiled logarithm knows positive numbers only
        way = fastest(probabilities.device.type, kernel_size)
    return way(
        image.detach(),
        probabilities.detach(),
        None if box_mask is None else box_mask.detach(),
        kernel_size=kernel_size,
        zeta=zeta,
        iterations=iterations,
        low=low,
        high=high,
    )


@functools.cache
def fastest(device_type: str, kernel_size: int = 3) -> Callable[..., Tensor]:
    """The way that is fastest on a kind of device, of those that can be had there. All take what `mean_field` takes.

    What is missing is said once, in the log. ``MAL_PLAIN_MEAN_FIELD=1`` in the environment leaves only plain torch.
    """
    if os.environ.get("MAL_PLAIN_MEAN_FIELD") == "1":
        return plain
    if device_type == "cpu":
        return _loop() or plain
    if device_type == "cuda" and kernel_size > 1:
        return _kernel(kernel_size) or plain
    return plain


def _loop() -> Callable[..., Tensor] | None:
    """The compiled loop, if numba can be had here."""
    try:
        from mal.model.mean_field_cpu import fused
    except (ImportError, RuntimeError, OSError) as error:  # no numba, none for this numpy, nowhere to keep its results
        _LOG.info("the mean field runs in plain torch, four times slower than compiled by numba: %s", error)
        return None

    def loop(image: Tensor, probabilities: Tensor, box_mask: Tensor | None, **options: Any) -> Tensor:
        box = None if box_mask is None else box_mask.float().numpy()
        q = fused(image.float().numpy(), probabilities.float().numpy(), box, threads=torch.get_num_threads(), **options)
        return torch.from_numpy(q)

    return loop


def _kernel(kernel_size: int) -> Callable[..., Tensor] | None:
    """The Triton kernel, if Triton can be had here and the neighbourhood fits its windows."""
    try:
        from mal.model.mean_field_gpu import MOST_REACH, tiled
    except ImportError as error:
        _LOG.info("the mean field runs in plain torch, not in a kernel of its own: %s", error)
        return None
    if kernel_size // 2 > MOST_REACH:
        return None

    def kernel(image: Tensor, probabilities: Tensor, box_mask: Tensor | None, **options: Any) -> Tensor:
        with torch.cuda.device(probabilities.device):
            return tiled(image, probabilities, box_mask, **options)

    return kernel


def plain(
    image: Tensor,
    probabilities: Tensor,
    box_mask: Tensor | None,
    *,
    kernel_size: int,
    zeta: float,
    iterations: int,
    low: float,
    high: float,
) -> Tensor:
    """`mean_field` in plain torch, anywhere: neighbours are shifted views, without the k^2 copies of unfolding."""
    box = None if box_mask is None else box_mask.float()
    q = probabilities.float() if box is None else probabilities.float() * box
    q = q.clamp(low, high)
    logs = q.new_empty(2, *q.shape)  # log(1 - q), log(q); to base 2, whose exponential is the faster one on CPUs
    sums = torch.empty_like(logs)
    log_not_q, log_q = logs
    a0, a1 = sums
    terms = [  # views of the buffers, made once: sum += affinity * log
        (sums[:, :, *one], affinity, logs[:, :, *other])
        for affinity, here, there in _affinities(image.float(), kernel_size, zeta)
        for one, other in ((here, there), (there, here))
    ]
    for _ in range(iterations):
        torch.sub(1.0, q, out=log_not_q)
        log_q.copy_(q)
        logs.log2_()
        sums.copy_(logs)  # the pixel itself: K_ii = 1
        for target, affinity, neighbour in terms:
            target.addcmul_(affinity, neighbour)
        sums.exp2_()
        if box is not None:
            a1.mul_(box)
        torch.div(a1, a0.add_(EPSILON).add_(a1), out=q).clamp_(low, high)
    return q


def _affinities(image: Tensor, kernel_size: int, zeta: float) -> list[tuple[Tensor, Slices, Slices]]:
    """``(K, here, there)`` for one half of the neighbourhood; the other half is the same with here and there exchanged.

    ``here`` and ``there`` are the rows and columns of the pixels that have this neighbour, and of the neighbours.
    """
    height, width = image.shape[-2:]
    reach = kernel_size // 2
    half = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1) if dy > 0 or dx > 0]
    neighbours = []
    for dy, dx in half:
        if dy >= height or abs(dx) >= width:
            continue
        here = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (slice(dy, height), slice(max(0, dx), width + min(0, dx)))
        difference = image[:, :, *here] - image[:, :, *there]
        affinity = difference.square_().sum(dim=1).mul_(-1.0 / (2.0 * zeta**2)).exp_()
        neighbours.append((affinity, here, there))
    return neighbours
