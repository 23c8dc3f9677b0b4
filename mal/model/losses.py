"""The losses that teach masks from boxes: multiple-instance learning and the CRF loss (METHOD section 4).

Pure functions of tensors. Everything is computed in float32, per box; `box_losses` puts it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mal.model.box_evidence import NO_EVIDENCE, BoxEvidence, refine_with_evidence
from mal.model.mean_field import mean_field
from mal.spec.schema import TrainSpec

DICE_EPSILON = 0.001
COUNT_EPSILON = 1e-4


@dataclass(frozen=True)
class BoxLosses:
    """The losses of a batch. Unweighted unless said otherwise."""

    total: Tensor
    """Scalar: the weighted sum, which is minimised."""
    mil: Tensor
    """Scalar, weighted."""
    crf: Tensor
    """Scalar, weighted."""
    mil_per_box: Tensor
    """[B], with gradient."""
    crf_per_box: Tensor
    """[B], with gradient."""
    refined: Tensor
    """[B, H, W], 0 or 1: the target of the CRF loss."""


@dataclass(frozen=True)
class MeanFieldOptions:
    """The mean field of the CRF loss; the names of the spec are ``train.crf_*``."""

    kernel_size: int = 3
    zeta: float = 0.1
    iterations: int = 100
    low: float = 0.1
    high: float = 0.9
    size_ratio: float = 1.0
    """Factor on the logits' size at which the CRF loss is computed."""
    evidence: BoxEvidence = NO_EVIDENCE
    """What shape and colours add to the probabilities before the mean field; by default nothing."""

    def map_size(self, logits_size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the maps that the mean field works on; at least one pixel."""
        height, width = (max(1, int(side * self.size_ratio)) for side in logits_size)
        return height, width

    def probabilities(self, image: Tensor, probabilities: Tensor, box_mask: Tensor) -> Tensor:
        """The refined probabilities: arguments and result as of `mean_field`, the evidence taken into account."""

        def refined(q: Tensor) -> Tensor:
            return mean_field(
                image,
                q,
                box_mask,
                kernel_size=self.kernel_size,
                zeta=self.zeta,
                iterations=self.iterations,
                low=self.low,
                high=self.high,
            )

        if not self.evidence:
            return refined(probabilities)
        return refine_with_evidence(probabilities, image, box_mask, self.evidence, refined)

    @classmethod
    def of(cls, train: TrainSpec) -> MeanFieldOptions:
        """Those of a spec, for training and for test time alike."""
        return cls(
            kernel_size=train.crf_kernel_size,
            zeta=train.crf_zeta,
            iterations=train.crf_num_iter,
            low=train.crf_value_low_thres,
            high=train.crf_value_high_thres,
            size_ratio=train.crf_size_ratio,
            evidence=BoxEvidence(
                shape_weight=train.crf_shape_weight,
                shape_radius=train.crf_shape_radius,
                colour_weight=train.crf_colour_weight,
                colour_zeta=train.crf_colour_zeta,
                rounds=train.crf_rounds,
                network_weight=train.crf_network_weight,
            ),
        )


def dice(prediction: Tensor, target: Tensor) -> Tensor:
    """``1 - 2 sum(p t) / (sum(p^2) + 0.001 + sum(t^2) + 0.001)`` per item: [B, ...] and [B, ...] -> [B]."""
    p, t = prediction.flatten(1), target.flatten(1)
    overlap = (p * t).sum(dim=1)
    return 1.0 - 2.0 * overlap / (p.square().sum(dim=1) + t.square().sum(dim=1) + 2.0 * DICE_EPSILON)


def mil_loss(probabilities: Tensor, box_mask: Tensor) -> Tensor:
    """Multiple-instance loss per box: the mask's extent along x and y against the box's.

    A column that crosses the box holds at least one pixel of the object, a column beside it none; likewise rows.

    Args:
        probabilities: [B, H, W] in [0, 1].
        box_mask: [B, H, W] in [0, 1], of the same size.

    Returns:
        [B], in [0, 2].
    """
    columns = dice(probabilities.amax(dim=1), box_mask.amax(dim=1))
    rows = dice(probabilities.amax(dim=2), box_mask.amax(dim=2))
    return columns + rows


def box_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    images: Tensor,
    box_mask: Tensor,
    *,
    mil_weight: float = 4.0,
    crf_weight: float = 0.5,
    crf: MeanFieldOptions | None = None,
) -> BoxLosses:
    """Both losses of a batch.

    Args:
        student_logits: [B, H, W], with gradient.
        teacher_logits: [B, H, W].
        images: [B, 3, S, S], the normalised crops that the student saw.
        box_mask: [B, S, S] or [B, 1, S, S], 1 inside the box.
        mil_weight, crf_weight: weights, the warm-up included (`warm_up`).
        crf: how the target is refined; the defaults of the spec if None.
    """
    crf = crf or MeanFieldOptions()
    size = tuple(student_logits.shape[-2:])
    boxes = _resize(box_mask.reshape(-1, 1, *box_mask.shape[-2:]).float(), size)
    student = student_logits.float().sigmoid()
    mil_per_box = mil_loss(student, boxes[:, 0])

    crf_size = crf.map_size(size)
    student_crf = _resize(student[:, None], crf_size)[:, 0]
    with torch.no_grad():
        teacher = _resize(teacher_logits.float().sigmoid()[:, None], crf_size)[:, 0]
        colours, box = _resize(images.float(), crf_size), _resize(boxes, crf_size)[:, 0]
        refined = (crf.probabilities(colours, (student_crf + teacher) / 2, box) > 0.5).float()
    crf_per_box = dice(student_crf, refined)

    mil = mil_weight * mil_per_box.sum() / (len(mil_per_box) + COUNT_EPSILON)
    crf_loss = crf_weight * crf_per_box.mean()
    return BoxLosses(mil + crf_loss, mil, crf_loss, mil_per_box, crf_per_box, refined)


def warm_up(epoch: int, step: int, length: int) -> float:
    """Factor of a loss weight: in epoch 0 it grows as ``step / length`` up to 1, afterwards it is 1.

    Args:
        step: optimiser steps done in this epoch.
        length: `train.loss_mil_step` or `train.loss_crf_step`; 0 for no warm-up.
    """
    if epoch > 0 or length <= 0:
        return 1.0
    return min(1.0, step / length)


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
