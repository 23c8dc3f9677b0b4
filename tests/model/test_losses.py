"""The losses: by hand, and step by step against the peer, with optimiser and teacher."""

from __future__ import annotations

import json

import pytest
import torch

from mal.model.backbones import build_backbone
from mal.model.losses import MeanFieldOptions, box_losses, dice, mil_loss, warm_up
from mal.model.network import MalNetwork, StudentTeacher
from mal.model.optimizer import build_optimizer


def test_dice_by_hand() -> None:
    p, t = torch.tensor([[0.5, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert dice(p, t).tolist() == pytest.approx([1 - 2 * 1.5 / (1.25 + 2 + 0.002), 1.0])


def test_mil_is_low_only_if_the_mask_fills_the_box_and_stays_in_it() -> None:
    box = torch.zeros(3, 8, 8)
    box[:, 2:6, 1:7] = 1
    cross = torch.zeros(8, 8)
    cross[2:6, 3] = 1  # touches all rows
    cross[4, 1:7] = 1  # and all columns of the box
    thin = torch.zeros(8, 8)
    thin[2:6, 3] = 1
    losses = mil_loss(torch.stack((cross, thin, torch.ones(8, 8))), box)
    assert losses[0] < 1e-3
    assert (losses[1:] > 0.3).all()


def test_mil_reaches_one_pixel_per_row_and_column() -> None:
    p = torch.rand(1, 5, 5, requires_grad=True)
    mil_loss(p, torch.ones(1, 5, 5)).sum().backward()
    assert 5 <= (p.grad != 0).sum() <= 10


def test_warm_up() -> None:
    assert [warm_up(0, step, 1000) for step in (0, 500, 1000, 5000)] == [0.0, 0.5, 1.0, 1.0]
    assert warm_up(1, 0, 1000) == 1.0
    assert warm_up(0, 0, 0) == 1.0


def test_weights_scale_the_losses_and_the_teacher_gets_no_gradient() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    images, box = torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.uint8)
    crf = MeanFieldOptions(iterations=2)
    once = box_losses(student, teacher, images, box, mil_weight=1, crf_weight=1, crf=crf)
    twice = box_losses(student, teacher, images, box, mil_weight=2, crf_weight=3, crf=crf)
    assert twice.mil.item() == pytest.approx(2 * once.mil.item())
    assert twice.crf.item() == pytest.approx(3 * once.crf.item())
    assert once.mil.item() == pytest.approx(once.mil_per_box.sum().item() / (2 + 1e-4))
    once.total.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_crf_at_another_size() -> None:
    logits, images, box = torch.randn(1, 8, 8), torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32)
    losses = box_losses(logits, logits, images, box, crf=MeanFieldOptions(iterations=1, size_ratio=2.0))
    assert losses.refined.shape == (1, 16, 16)
    losses = box_losses(logits, logits, images, box, crf=MeanFieldOptions(iterations=1, size_ratio=0.01))
    assert losses.refined.shape == (1, 1, 1)


def _norm(module: torch.nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in module.parameters()]).norm().item()


@pytest.mark.shared
@pytest.mark.parametrize("run", [1, 3])
def test_training_step_agrees_with_the_peer(reference, run: int) -> None:
    """Losses, gradients, AdamW and EMA of one step. Step 0 has zero weights, and 2 lies between 1 and 3."""
    saved = reference.load("losses.pt")
    expected = saved["runs"][run]
    weights = {key: value.float() for key, value in reference.load("model_vit_tiny.pt")["state_dict"].items()}
    pair = StudentTeacher(MalNetwork(build_backbone("vit-deit-tiny/16")))
    pair.student.load_state_dict(weights)
    pair.teacher.load_state_dict({key: 0.95 * value for key, value in weights.items()})
    corners = saved["bbox"]
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])

    losses = box_losses(
        pair.student(saved["image"], areas),
        pair.teacher(saved["timage"], areas),
        saved["image"],
        saved["mask"],
        mil_weight=4 * warm_up(expected["epoch"], expected["local_step"], 1000),
        crf_weight=0.5 * warm_up(expected["epoch"], expected["local_step"], 4000),
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(losses.mil_per_box, expected["raw_mil_per_item"], **tolerance)
    torch.testing.assert_close(losses.crf_per_box, expected["raw_dice_vs_refined_per_item"], **tolerance)
    assert losses.mil.item() == pytest.approx(expected["loss_mil"], rel=1e-4)
    assert losses.crf.item() == pytest.approx(expected["loss_crf"], rel=1e-4)
    assert losses.total.item() == pytest.approx(expected["total"], rel=1e-4)
    assert (losses.refined != expected["refined_mask"]).sum() <= 2

    losses.total.backward()
    norms = expected["grad_norms"]
    for name in ("mask_head", "roi_head", "backbone"):
        assert _norm(getattr(pair.student, name)) == pytest.approx(norms[name], rel=1e-3)
    weight = pair.student.mask_head.convs[3].conv.weight
    torch.testing.assert_close(
        weight.grad[0, :4], norms["mask_head.convs.3.conv.weight.grad[0,:4]"], rtol=1e-3, atol=1e-6
    )

    build_optimizer(pair.student, lr=expected["lr_used"]).step()
    pair.update_teacher(0.996)
    torch.testing.assert_close(weight[0, :4], expected["student_w_after"], rtol=0, atol=1e-8)
    teacher_weight = pair.teacher.mask_head.convs[3].conv.weight
    torch.testing.assert_close(teacher_weight[0, :4], expected["teacher_w_after"], rtol=0, atol=1e-8)


@pytest.mark.shared
def test_warm_up_agrees_with_the_peer(reference) -> None:
    expected = json.loads((reference.folder / "schedule.json").read_text())["loss_warmup"]
    assert [warm_up(0, step, expected["mil_step"]) for step in expected["steps"]] == expected["mil"]
    assert [warm_up(0, step, expected["crf_step"]) for step in expected["steps"]] == expected["crf"]
