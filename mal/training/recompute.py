"""Activation checkpointing: what is inside a block is not kept for the backward pass, but computed again there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mal.errors import SpecError


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone, in order: the members of every list whose name ends in ``blocks``."""
    return [m for name, m in network.named_modules() if name.rpartition(".")[0].endswith("blocks")]


def recompute_in_backward(student: nn.Module) -> None:
    """Checkpoint every block of ``student``, in place. Names in the state dict do not change.

    Raises:
        SpecError: it has no blocks.
    """
    blocks = transformer_blocks(student)
    if not blocks:
        raise SpecError("train.activation_checkpointing: this backbone has no blocks to compute again; set it to false")
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Inside, batch norms leave their running statistics alone: the first forward pass has updated them."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    before = [(norm, norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            cast(Tensor, norm.num_batches_tracked).copy_(batches)
