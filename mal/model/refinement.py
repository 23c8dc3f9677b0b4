"""Refinement of finished masks by the mean field, at test time (`use_crf_test`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mal.model.losses import MeanFieldOptions

SUREST = 0.01
"""Refined probabilities are kept this far from 0 and 1, so that they have logits."""


@torch.no_grad()
def refined_logits(logits: Tensor, images: Tensor, box_mask: Tensor, options: MeanFieldOptions) -> Tensor:
    """Logits after the mean field, at their own size.

    The mean field keeps its probabilities within ``[low, high]``; they are stretched to (0, 1), so that the threshold
    of masks means the same with and without refinement.

    Args:
        logits: [B, h, w].
        images: [B, 3, S, S], the normalised crops.
        box_mask: [B, S, S], 1 inside the box.

    Returns:
        [B, h, w], float32.
    """
    size = (logits.shape[-2], logits.shape[-1])
    colours = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    box = F.interpolate(box_mask[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    q = options.probabilities(colours, logits.float().sigmoid(), box)
    return ((q - options.low) / (options.high - options.low)).clamp(SUREST, 1.0 - SUREST).logit()
