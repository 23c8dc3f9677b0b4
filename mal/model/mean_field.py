"""Mean-field refinement of masks: snaps a mask to the colour edges of its crop (METHOD section 4).

For pixel i and each neighbour j of its k x k window: ``K_ij = exp(-|I_i - I_j|^2 / (2 zeta^2))``, 0 outside the image.
Iterated from the clamped probabilities q: ``m0 = sum_j K_ij * -log(1 - q_j)``, ``m1 = sum_j K_ij * -log(q_j)``,
``a0 = exp(-m0)``, ``a1 = exp(-m1) * box``, ``q = clamp(a1 / (1e-6 + a0 + a1))``.

K is computed once and is symmetric, so only one of each pair of opposite neighbours is stored; neighbours are read as
shifted views of the map, without the k^2 copies that unfolding would make.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
