"""Whether a checkpoint fits the spec's network, seen before anything is started; no weights are put anywhere."""

from __future__ import annotations

import dataclasses

import torch

from mal.errors import SpecError
from mal.model.backbones import Stem
from mal.model.network import MalNetwork, build_network
from mal.model.weights import load_network, read_checkpoint
from mal.spec.schema import ModelSpec, PoolSpec, Spec


def check_checkpoint(spec: Spec, pool: PoolSpec) -> str:
    """What the checkpoint was recognised as, and which of its names match: a line to be shown.

    Raises:
        CheckpointError: it cannot be used, or does not fit. A wrong architecture is named.
    """
    checkpoint = read_checkpoint(pool.checkpoint or "", spec.encryption_key)
    network = _hollow(spec.model, spec.dataset.crop_size, checkpoint.stem)
    report = load_network(
        network, checkpoint, which="teacher" if pool.use_teacher_test else "student", strict=spec.model.strict
    )
    if pool.use_mixed_model_test:
        load_network(network, checkpoint, which="teacher", strict=spec.model.strict)
    return f"{checkpoint}: {report}"


def _hollow(model: ModelSpec, crop_size: int, stem: Stem) -> MalNetwork:
    """The network without memory for its weights, where it can be built so."""
    model = dataclasses.replace(model, pretrained=False)
    try:
        with torch.device("meta"):
            return build_network(model, crop_size=crop_size, stem=stem)
    except SpecError:
        raise
    except (RuntimeError, NotImplementedError):  # some of timm's compute with values while being built
        return build_network(model, crop_size=crop_size, stem=stem)
