"""What a box and its crop's colours say: by hand, on shapes whose truth is known, and within the losses."""

from __future__ import annotations

import math

import torch

from mal.model.box_evidence import RAREST, BoxEvidence, colour_logits, refine_with_evidence, shape_logits
from mal.model.losses import MeanFieldOptions, box_losses
from mal.model.mean_field import mean_field
from mal.model.refinement import refined_logits

SIDE = 32


def box() -> torch.Tensor:
    """[1, SIDE, SIDE]: rows 4..28, columns 8..24."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 4:28, 8:24] = 1
    return mask


def disc() -> torch.Tensor:
    """A disc that does not fill the box, off its centre."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return (((y - 13) / 8) ** 2 + ((x - 15) / 6) ** 2 <= 1).float()[None]


def scene() -> torch.Tensor:
    """[1, 3, SIDE, SIDE]: a disc of one colour on ground of another."""
    colours = torch.tensor([[1.0, -0.5, 0.0], [-1.0, 0.5, 0.3]])
    return colours[disc()[0].long()].permute(2, 0, 1)[None]


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a > 0.5, b > 0.5
    return float((a & b).sum() / (a | b).sum())


def test_shape_is_zero_on_the_ellipse_and_greatest_in_the_middle() -> None:
    logits = shape_logits(box(), radius=1.0)[0]
    assert logits[15:17, 15:17].min() > 0.98
    y, x = 15, 23  # half a pixel inside the box's right side: r = 7.5 / 8
    assert abs(logits[y, x].item() - (1 - (7.5 / 8) ** 2 - (0.5 / 12) ** 2)) < 1e-5
    assert logits[4, 8] < 0  # a corner
    torch.testing.assert_close(logits, logits.flip(0))


def test_shape_of_boxes_with_fractional_borders_and_of_an_empty_one() -> None:
    half = torch.zeros(2, 8, 8)
    half[0, 2:6, 2:7] = 1
    half[0, :, 6] *= 0.5  # 4.5 columns wide, from 2 to 6.5
    across = shape_logits(half, 1.0)[0, 4]
    assert across[2].item() > across[6].item()
    assert torch.isfinite(shape_logits(half, 1.0)).all()


def test_colours_tell_the_object_from_what_surrounds_it() -> None:
    logits = colour_logits(scene(), box() * 0.5, zeta=0.2)
    inside, outside = logits[disc() > 0], logits[(disc() == 0)]
    assert inside.min() > 0.5
    assert outside.max() < -0.5
    assert logits.abs().max() <= -math.log(RAREST) + 1e-3


def test_colours_alone_do_not_care_where_a_pixel_is() -> None:
    logits = colour_logits(scene(), box() * 0.5, zeta=0.2)[0]
    same = scene()[0, 0] == 1.0
    assert logits[same].std() < 1e-4


def evident(probabilities: torch.Tensor, evidence: BoxEvidence) -> torch.Tensor:
    """The evidence alone, without a mean field."""
    return refine_with_evidence(probabilities, scene(), box(), evidence, lambda q: q * box())


def test_shape_and_colours_find_the_object_where_the_network_knows_nothing() -> None:
    unknown = torch.full((1, SIDE, SIDE), 0.5)
    both = evident(unknown, BoxEvidence(shape_weight=2.0, colour_weight=2.0))
    shape = evident(unknown, BoxEvidence(shape_weight=2.0))
    assert iou(both, disc()) > 0.9
    assert iou(both, disc()) > iou(shape, disc()) + 0.2


def test_the_networks_weight_decides_how_much_it_is_heard() -> None:
    sure = disc() * 0.98 + 0.01
    deaf, hearing = (evident(sure, BoxEvidence(shape_weight=2.0, network_weight=weight)) for weight in (0.0, 1.0))
    assert torch.equal(deaf, evident(1 - sure, BoxEvidence(shape_weight=2.0, network_weight=0.0)))
    assert iou(hearing, disc()) == 1.0


def test_every_round_counts_the_colours_of_the_round_before() -> None:
    unknown = torch.full((1, SIDE, SIDE), 0.5)
    found = [
        iou(evident(unknown, BoxEvidence(shape_weight=2.0, colour_weight=1.0, rounds=rounds)), disc())
        for rounds in (1, 4)
    ]
    assert found[0] + 0.05 < found[1]


def test_without_evidence_the_mean_field_runs_once_on_the_probabilities() -> None:
    assert not BoxEvidence()
    probabilities = torch.rand(1, SIDE, SIDE)
    options = MeanFieldOptions(zeta=0.3, iterations=3)
    plain = mean_field(scene(), probabilities, box(), zeta=0.3, iterations=3)
    assert torch.equal(options.probabilities(scene(), probabilities, box()), plain)


def test_the_target_of_training_and_refined_masks_follow_it() -> None:
    logits = torch.zeros(1, SIDE, SIDE, requires_grad=True)
    on = MeanFieldOptions(zeta=0.3, iterations=10, evidence=BoxEvidence(shape_weight=2.0, colour_weight=2.0))
    off = MeanFieldOptions(zeta=0.3, iterations=10)
    targets = [box_losses(logits, logits, scene(), box(), crf=crf).refined for crf in (on, off)]
    assert iou(targets[0], disc()) > 0.9
    assert iou(targets[1], disc()) < 0.5
    found = [refined_logits(logits.detach(), scene(), box(), crf) > 0 for crf in (on, off)]
    assert iou(found[0].float(), disc()) > 0.9
    assert iou(found[1].float(), disc()) < 0.5
    losses = box_losses(logits, logits, scene(), box(), crf=on)
    losses.total.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
