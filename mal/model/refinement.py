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
    """Logits after the mean field, which runs at ``options.size_ratio`` times their size, as in training.

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
    coarse = options.map_size(size)
    q = options.probabilities(
        _resize(images.float(), coarse),
        _resize(logits.float().sigmoid()[:, None], coarse)[:, 0],
        _resize(box_mask[:, None].float(), coarse)[:, 0],
    )
    refined = ((q - options.low) / (options.high - options.low)).clamp(SUREST, 1.0 - SUREST).logit()
    return _resize(refined[:, None], size)[:, 0]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
