"""Activation checkpointing changes memory, not results."""

from __future__ import annotations

import pytest
import torch
from tiny_training import cut_blocks, make_batch, tiny_model, tiny_spec
from torch import nn

from mal.errors import SpecError
from mal.training.recompute import recompute_in_backward, transformer_blocks
from mal.training.step import Moment, Stepper

TIMM = "timm/test_vit"


@pytest.mark.parametrize("arch", ["vit-deit-tiny/16", "fan_tiny_12_p16_224", TIMM])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_losses_weights_and_statistics_stay_equal(monkeypatch, arch, drop_path):
    cut_blocks(monkeypatch)
    results = []
    for again in (False, True):
        spec = tiny_spec(f"model.arch={arch}", f"model.vit_dpr={drop_path}", f"train.activation_checkpointing={again}")
        stepper = Stepper(spec, tiny_model(spec), torch.device("cpu"), 1)
        stepper.model.train()
        losses = [stepper.step([make_batch(step, 2)], Moment(1, step, 9)).tolist() for step in range(3)]
        results.append((losses, stepper.model.state_dict()))
    (plain, weights), (recomputed, same) = results
    assert recomputed == plain
    assert set(same) == set(weights)
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def _kept(activation_checkpointing: bool) -> int:
    """Bytes that a forward pass of the student keeps for the backward pass."""
    spec = tiny_spec(f"train.activation_checkpointing={activation_checkpointing}")
    stepper = Stepper(spec, tiny_model(spec), torch.device("cpu"), 1)
    batch, kept = make_batch(0, 2), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in stepper.model.student.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = stepper.strategy.student(batch["image"], batch["area"])
    assert logits.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_less_is_kept():
    assert _kept(True) < 0.5 * _kept(False)


def test_the_teacher_is_left_alone_and_a_backbone_without_blocks_is_told():
    model = tiny_model(tiny_spec("train.activation_checkpointing=true"))
    recompute_in_backward(model.student)
    assert all("forward" in vars(block) for block in transformer_blocks(model.student))
    assert not any("forward" in vars(block) for block in transformer_blocks(model.teacher))
    with pytest.raises(SpecError, match=r"train\.activation_checkpointing"):
        recompute_in_backward(nn.Sequential(nn.Conv2d(3, 3, 3)))
