"""What a box and the colours of its crop say about a mask: logits that join the network's own before the mean field.

The mean field alone moves a mask's border to the nearest colour edge. Learning from random weights needs more to begin
with, as the network knows nothing yet: where in a box objects mostly are, and which colours are the object's. Both are
off by default (METHOD section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_GRID = 12
"""Colours are sampled from this many by this many means of the crop."""
RAREST = 1e-3
"""Density below which a colour counts as not seen: bounds the colours' logits by +-log(1000)."""
SUREST = 1e-3
"""Probabilities are kept this far from 0 and 1 before their logits are taken."""


@dataclass(frozen=True)
class BoxEvidence:
    """Weights of the two kinds of evidence; the names of the spec are ``train.crf_*``."""

    shape_weight: float = 0.0
    """Of `shape_logits`; 0: off."""
    shape_radius: float = 1.15
    """Square of the ellipse's radius, in half-extents of the box."""
    colour_weight: float = 0.0
    """Of `colour_logits`; 0: off."""
    colour_zeta: float = 0.2
    """Width of the Gaussian around a colour, in normalised units."""
    rounds: int = 2
    """How often colours are counted and the mask is refined, one after the other."""
    network_weight: float = 1.0
    """Of the network's own logits beside them."""

    def __bool__(self) -> bool:
        return self.shape_weight > 0 or self.colour_weight > 0


NO_EVIDENCE = BoxEvidence()


@torch.no_grad()
def refine_with_evidence(
    probabilities: Tensor,
    image: Tensor,
    box_mask: Tensor,
    evidence: BoxEvidence,
    refine: Callable[[Tensor], Tensor],
) -> Tensor:
    """Probabilities after ``rounds`` of counting colours and of the mean field.

    The colours of object and background are counted with the probabilities of the round before, in the first round
    those that network and shape give together; beside the box everything is background. As GrabCut does it (Rother et
    al., SIGGRAPH 2004), with densities instead of mixtures and the mean field instead of a cut.

    Args:
        probabilities: [B, H, W] in [0, 1], the network's.
        image: [B, C, H, W], normalised colours.
        box_mask: [B, H, W] in [0, 1], 1 inside the box.
        refine: the mean field, from probabilities [B, H, W] to probabilities.

    Returns:
        [B, H, W], float32, as ``refine`` gives them. No gradient.
    """
    logits = evidence.network_weight * probabilities.float().clamp(SUREST, 1.0 - SUREST).logit()
    if evidence.shape_weight:
        logits = logits + evidence.shape_weight * shape_logits(box_mask, evidence.shape_radius)
    q = logits.sigmoid() * box_mask
    for _ in range(evidence.rounds):
        if evidence.colour_weight:
            colours = colour_logits(image, q, evidence.colour_zeta)
            q = (logits + evidence.colour_weight * colours).sigmoid()
        q = refine(q)
    return q


def shape_logits(box_mask: Tensor, radius: float) -> Tensor:
    """``radius - r^2``, r the distance from the box's centre in half-extents: above 0 within an ellipse.

    Args:
        box_mask: [B, H, W] in [0, 1], an upright rectangle, its border pixels fractional.

    Returns:
        [B, H, W], float32, finite for an empty box mask, too.
    """
    down = _axis(box_mask.float().amax(dim=2))
    across = _axis(box_mask.float().amax(dim=1))
    return radius - down[:, :, None] - across[:, None, :]


def _axis(profile: Tensor) -> Tensor:
    """Squared distance from the centre in half-extents along one axis: [B, L] -> [B, L]."""
    place = torch.arange(profile.shape[1], device=profile.device, dtype=profile.dtype) + 0.5
    length = profile.sum(dim=1, keepdim=True).clamp_min(1.0)
    centre = (profile * place).sum(dim=1, keepdim=True) / length
    return ((place - centre) / (length / 2)).square()


def colour_logits(image: Tensor, object_share: Tensor, zeta: float) -> Tensor:
    """How much likelier each pixel's colour is in the object than in the background of the same crop.

    The log-ratio of two kernel density estimates.

    Args:
        image: [B, C, H, W], normalised colours.
        object_share: [B, H, W] in [0, 1]: how much of a pixel is object.

    Returns:
        [B, H, W], float32.
    """
    size = min(COLOUR_GRID, *image.shape[-2:])
    colours = F.adaptive_avg_pool2d(image.float(), size).flatten(2).transpose(1, 2)
    share = F.adaptive_avg_pool2d(object_share[:, None].float(), size).flatten(1)
    weights = torch.stack([share, 1.0 - share], dim=2)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(SUREST)
    pixels = image.float().flatten(2).transpose(1, 2)
    likeness = torch.cdist(pixels, colours).square_().mul_(-1.0 / (2.0 * zeta**2)).exp_()
    densities = (likeness @ weights + RAREST).log()
    return (densities[..., 0] - densities[..., 1]).unflatten(1, object_share.shape[-2:])
