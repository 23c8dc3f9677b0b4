"""What the optimiser trains and what it decays."""

from __future__ import annotations

import pytest

from mal.errors import SpecError
from mal.model.backbones import freeze
from mal.model.network import MalNetwork
from mal.model.optimizer import build_optimizer


def test_everything_is_decayed_by_default(tiny_network: MalNetwork) -> None:
    optimizer = build_optimizer(tiny_network, lr=1e-3, weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.9)
    assert len(group["params"]) == len(list(tiny_network.parameters()))


def test_norms_and_embeddings_can_be_left_out(tiny_network: MalNetwork) -> None:
    optimizer = build_optimizer(tiny_network, lr=1e-3, decay_norms=False)
    decayed, undecayed = (group["params"] for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert all(parameter.ndim > 1 for parameter in decayed)
    assert {id(tiny_network.backbone.pos_embed), id(tiny_network.backbone.norm.weight)} <= {id(p) for p in undecayed}
    assert len(decayed) + len(undecayed) == len(list(tiny_network.parameters()))


def test_frozen_stages_are_left_out(tiny_network: MalNetwork) -> None:
    freeze(tiny_network.backbone, [0, 1])
    optimizer = build_optimizer(tiny_network, lr=1e-3)
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])


def test_unknown_kind(tiny_network: MalNetwork) -> None:
    with pytest.raises(SpecError, match=r"train\.optim_type: 'sgd'"):
        build_optimizer(tiny_network, lr=1e-3, kind="sgd")
