"""The optimiser of the student: AdamW, with a choice of what is decayed (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mal.errors import SpecError

UNDECAYED_NAMES = ("pos_embed", "cls_token", "reg_token", "temperature")


def build_optimizer(
    student: nn.Module,
    *,
    lr: float,
    weight_decay: float = 5e-4,
    betas: Sequence[float] = (0.9, 0.9),
    eps: float = 1e-8,
    decay_norms: bool = True,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over the parameters of ``student`` that are trained (frozen ones are left out).

    Args:
        decay_norms: decay biases, norms, layer scales and embeddings as well, as the peers do; off, only matrices and
            kernels are decayed (`train.decay_norms`).
        kind: `train.optim_type`; only ``adamw``.

    Raises:
        SpecError: another kind, or nothing is left to train.
    """
    if kind.lower() != "adamw":
        raise SpecError(f"train.optim_type: {kind!r} is not supported; use adamw")
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and not any(part in UNDECAYED_NAMES for part in name.split("."))
        (decayed if decay_norms or is_matrix else undecayed).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (undecayed, 0.0))
        if parameters
    ]
    if not groups:
        raise SpecError("model.frozen_stages: nothing is left to train")
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, foreach=True)
