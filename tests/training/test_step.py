"""One optimiser step, without Ray."""

from __future__ import annotations

import pytest
import torch
from tiny_training import make_batch, tiny_model, tiny_spec

from mal.training.step import Moment, Stepper

CPU = torch.device("cpu")


def _stepper(*overrides: str) -> Stepper:
    spec = tiny_spec(*overrides)
    return Stepper(spec, tiny_model(spec), CPU, workers=1)


def test_steps_lower_the_loss_and_the_teacher_follows_without_gradients():
    stepper = _stepper("train.lr=3e-4")
    before = {k: v.clone() for k, v in stepper.model.teacher.state_dict().items()}
    losses = [stepper.step([make_batch(0, 4)], Moment(1, k, 30))[0].item() for k in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    after = stepper.model.teacher.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and not p.requires_grad for p in stepper.model.teacher.parameters())


def test_the_rate_is_set_before_the_step_so_the_first_step_of_a_warm_up_changes_nothing():
    stepper = _stepper("train.warmup_epochs=1")
    before = {k: v.clone() for k, v in stepper.model.student.state_dict().items()}
    stepper.step([make_batch(0, 2)], Moment(0, 0, 10))
    assert all(torch.equal(before[k], v) for k, v in stepper.model.student.state_dict().items())


def test_accumulated_batches_step_as_one_batch_of_their_sum():
    whole, parts = _stepper(), _stepper()
    batch = make_batch(3, 4)
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    a = whole.step([batch], Moment(1, 0, 10))
    b = parts.step(halves, Moment(1, 0, 10))
    # The batch's MIL loss divides by n + 1e-4, so halves differ from the whole in the fifth digit.
    assert b.tolist() == pytest.approx(a.tolist(), rel=1e-4)
    for p, q in zip(whole.model.student.parameters(), parts.model.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-4)


def test_frozen_stages_are_not_trained():
    stepper = _stepper("model.frozen_stages=[0,1,2]")
    before = {k: v.clone() for k, v in stepper.model.student.state_dict().items()}
    stepper.step([make_batch(0, 2)], Moment(1, 0, 10))
    changed = {k for k, v in stepper.model.student.state_dict().items() if not torch.equal(before[k], v)}
    assert not any(k.startswith(("backbone.patch_embed", "backbone.blocks.0.", "backbone.blocks.1.")) for k in changed)
    assert any(k.startswith("backbone.blocks.2.") for k in changed)


def test_drop_path_is_repeated_by_a_resumed_step():
    results = []
    for _ in range(2):
        stepper = _stepper("model.vit_dpr=0.5")
        torch.manual_seed(torch.seed() % 1000)  # whatever went before
        stepper.model.train()
        results.append(stepper.step([make_batch(0, 2)], Moment(1, 4, 10)).tolist())
    assert results[0] == results[1]
