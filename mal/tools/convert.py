"""``mal convert``: any recognised checkpoint as safetensors or as this project's ``.pth``; and the model it is of."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

import mal
from mal import storage
from mal.architectures import DEFAULT
from mal.errors import CheckpointError, SpecError
from mal.model.weights import Checkpoint, read_checkpoint
from mal.spec.load import spec_from_values, spec_to_values
from mal.spec.schema import ModelSpec, Spec

FORMAT = "mal-weights-1"
SUFFIXES = (".safetensors", ".pth")

Part = Literal["all", "student", "teacher", "backbone"]


def convert(source: str, target: str, part: Part = "all") -> str:
    """Write the weights of ``source`` to ``target``, whose suffix says how. Returns a line on what was done.

    The optimiser's state and the like are left behind; the spec, if the checkpoint has one, goes along.

    Raises:
        SpecError: the suffix is neither of `SUFFIXES`.
        StorageError: a file cannot be read or written.
        CheckpointError: ``source`` is broken, would run code, or has no such part.
    """
    if not target.endswith(SUFFIXES):
        raise SpecError(f"{target}: the name must end in {' or '.join(SUFFIXES)}")
    checkpoint = read_checkpoint(source)
    state = {name: tensor.contiguous() for name, tensor in _chosen(checkpoint, part).items()}
    spec = saved_spec(checkpoint)
    about = {
        "format": FORMAT,
        "architecture": checkpoint.architecture or "unknown",
        "mal_version": mal.__version__,
        **({} if spec is None else {"spec": json.dumps(spec_to_values(spec))}),
    }
    if target.endswith(".safetensors"):
        # Tensors that share memory (a peer's tied weights) must be written apart.
        data = safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()}, about)
    else:
        buffer = io.BytesIO()
        torch.save({"state_dict": state, **about}, buffer)
        data = buffer.getvalue()
    storage.write_bytes(target, data)
    return f"{checkpoint}\n{target}: {len(state)} tensors, {len(data) / 1e6:.1f} MB"


def _chosen(checkpoint: Checkpoint, part: Part) -> dict[str, Tensor]:
    """The weights of one part, named as `mal.model.weights.recognise` reads them again."""
    if part == "backbone":
        return checkpoint.backbone_state
    if part != "all":
        return checkpoint.network(part)
    if checkpoint.kind in ("backbone", "network"):
        return checkpoint.backbone_state if checkpoint.kind == "backbone" else checkpoint.network()
    networks = {"student": checkpoint.student, "teacher": checkpoint.teacher}
    return {f"{which}.{name}": tensor for which, state in networks.items() for name, tensor in (state or {}).items()}


def saved_spec(checkpoint: Checkpoint) -> Spec | None:
    """The spec in a checkpoint of this project; None if it has none that this version reads."""
    values = checkpoint.meta.get("spec")
    try:
        return None if values is None else spec_from_values(json.loads(values) if isinstance(values, str) else values)
    except (SpecError, ValueError):
        return None


def model_of(checkpoint: Checkpoint, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The section ``model`` that fits a checkpoint: its own spec's, else read from the shapes.

    What shapes cannot tell (`not_adjust_scale`, `mask_scale_ratio`) has its default, unless ``overrides`` say.

    Raises:
        CheckpointError: it holds no network.
        SpecError: neither the checkpoint nor ``overrides`` tell the architecture.
    """
    network = checkpoint.network("teacher" if checkpoint.student is None else "student")
    given = dict(overrides or {})
    spec = saved_spec(checkpoint)
    if spec is not None:
        found = spec.model
    else:
        convs = sorted(name for name in network if name.startswith("mask_head.convs.") and name.endswith("conv.weight"))
        if not convs:
            raise CheckpointError(f"{checkpoint.source}: has no mask head, it cannot make masks")
        architecture = checkpoint.architecture
        if architecture is None and "arch" not in given:
            raise SpecError(
                f"{checkpoint.source}: its backbone is none of the built-in ones; say which: model.arch=NAME"
            )
        found = ModelSpec(
            arch=architecture or DEFAULT,
            mask_head_num_convs=len(convs),
            mask_head_hidden_channel=network[convs[0]].shape[0],
            mask_head_out_channel=network[convs[-1]].shape[0],
        )
    return dataclasses.replace(found, **given, pretrained=False)
