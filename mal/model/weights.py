"""Checkpoints of any origin: what is in the file, and its weights into a network.

    path --safe_loading--> content --recognise--> Checkpoint --load_network | load_backbone | load_pretrained--> model

Recognised are this project's checkpoints, those of the peers (``student.*`` / ``teacher.*``), a network alone, and
backbones: MAE, DeiT, timm and FAN weights, under ``model``, ``state_dict`` or no name at all, as PyTorch or safetensors
files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mal import pretrained, storage
from mal.architectures import ARCHITECTURES
from mal.encryption import opened
from mal.errors import CheckpointError
from mal.model.backbones import Backbone, Stem
from mal.model.network import MalNetwork, StudentTeacher
from mal.model.safe_loading import load_content, load_pickle
from mal.model.timm_backbone import PREFIX, TimmBackbone

__all__ = [
    "Checkpoint",
    "LoadReport",
    "identify_architecture",
    "load_backbone",
    "load_network",
    "load_pickle",
    "load_pretrained",
    "read_checkpoint",
    "recognise",
]

Kind = Literal["mal", "peer", "network", "backbone"]
Which = Literal["student", "teacher"]
State = dict[str, Tensor]

_KIND_TEXT: dict[Kind, str] = {
    "mal": "a checkpoint of this project",
    "peer": "a checkpoint of another mask auto-labeler, with student and teacher",
    "network": "the weights of one network",
    "backbone": "the weights of a backbone",
}
_NESTED = ("state_dict", "model", "model_state_dict", "module", "model_ema", "state_dict_ema", "teacher", "net")
"""Where in a file the weights may be, the likeliest first."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "_forward_module.")
"""Prefixes that data parallelism, compilation and trainers put before every name."""
_IGNORED = re.compile(r"(head|head_dist|fc_norm|fc|classifier|decoder\w*|mask_token|dist_token)(\.|$)")
"""Parts of classifiers and autoencoders that no mask network has; names within a backbone."""
_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a file. Names have no ``student.``, ``teacher.`` or ``backbone.`` in front."""

    source: str
    kind: Kind
    student: State | None = None
    """A network's weights: ``backbone.*``, ``roi_head.*``, ``mask_head.*``."""
    teacher: State | None = None
    backbone: State | None = None
    """A backbone's weights, if the file holds no more than that."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What is in the file beside the weights: epoch, spec, optimiser ..."""

    @property
    def backbone_state(self) -> State:
        """The weights of the backbone, the student's if there is one."""
        if self.backbone is not None:
            return self.backbone
        return _within(self.student or self.teacher or {}, "backbone.")

    @property
    def architecture(self) -> str | None:
        """Name of the architecture, seen from the shapes; None if it is none of the thirteen."""
        return identify_architecture(self.backbone_state)

    @property
    def stem(self) -> Stem:
        """Whether a ViT has the research code's convolutional stem."""
        return "conv" if "patch_embed.proj.0.0.weight" in self.backbone_state else "patch"

    def network(self, which: Which = "student") -> State:
        """The weights of the student or the teacher. A file of one network alone gives it for both.

        Raises:
            CheckpointError: the file holds only a backbone, or not that network.
        """
        state = self.student if which == "student" or self.kind == "network" else self.teacher
        if state is None:
            held = "only a backbone" if self.kind == "backbone" else f"no {which}"
            raise CheckpointError(
                f"{self.source}: holds {held}, which cannot make masks; give a checkpoint of `mal train`"
            )
        return state

    def __str__(self) -> str:
        tensors = len(self.backbone or {}) + len(self.student or {}) + len(self.teacher or {})
        return f"{self.source}: {_KIND_TEXT[self.kind]}, {self.architecture or 'other architecture'}, {tensors} tensors"


@dataclass(frozen=True)
class LoadReport:
    """What became of the names of a checkpoint and of a model."""

    matched: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """In the file, of no use here: classifiers, decoders."""
    missing: tuple[str, ...] = ()
    """In the model alone; they keep their values. Only without ``strict``."""
    unexpected: tuple[str, ...] = ()
    """In the file alone, or of another shape. Only without ``strict``."""
    resampled: tuple[str, ...] = ()
    """Position embeddings brought to another grid."""

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for word in ("resampled", "ignored", "missing", "unexpected"):
            names = getattr(self, word)
            if names:
                parts.append(f"{len(names)} {word} ({_listed(names)})")
        return ", ".join(parts)


def read_checkpoint(path: str, key: str | None = None) -> Checkpoint:
    """Read a file of weights, local, remote or built in (`mal.pretrained`), and recognise what it is.

    Raises:
        StorageError: it cannot be read.
        CheckpointError: it is broken, would run code, or holds no weights.
    """
    return recognise(opened(storage.read_bytes(pretrained.located(path)), key, path), path)


def recognise(data: bytes, name: str) -> Checkpoint:
    """As `read_checkpoint`, from the file's bytes; ``name`` is for messages."""
    values, metadata = load_content(data, name)
    state, meta = _find_weights(values, name)
    meta = {**meta, **metadata}
    state = _unwrap(state)
    if any(key.startswith(("student.", "teacher.")) for key in state):
        kind: Kind = "mal" if str(meta.get("format", "")).startswith("mal-") else "peer"
        student, teacher = _within(state, "student."), _within(state, "teacher.")
        return Checkpoint(name, kind, student or None, teacher or None, meta=meta)
    if any(key.startswith(("roi_head.", "mask_head.")) for key in state):
        return Checkpoint(name, "network", state, meta=meta)
    inner = _within(state, "backbone.")  # public FAN weights have this prefix
    return Checkpoint(name, "backbone", backbone=inner or state, meta=meta)


def load_network(
    network: MalNetwork, checkpoint: Checkpoint, *, which: Which = "student", strict: bool = True
) -> LoadReport:
    """Put the checkpoint's student or teacher into a network; into one on the meta device, only see whether it fits.

    Raises:
        CheckpointError: the file has no such network; or, if ``strict``, names or shapes differ. A wrong architecture
            is named.
    """
    return _load(network, checkpoint.network(which), checkpoint, "backbone.", strict)


def load_backbone(backbone: Backbone, checkpoint: Checkpoint, *, strict: bool = True) -> LoadReport:
    """Put the checkpoint's backbone (the student's, if it holds networks) into a backbone.

    Raises:
        CheckpointError: if ``strict``, names or shapes differ. A wrong architecture is named.
    """
    state = checkpoint.backbone_state
    if not isinstance(backbone, TimmBackbone):
        return _load(backbone, state, checkpoint, "", strict)
    own = backbone.state_dict()
    named = {key if key in own else PREFIX + key: value for key, value in state.items()}
    kept = {key: value for key, value in named.items() if key in own}  # the rest belongs to layers that were cut off
    report = _load(backbone, kept, checkpoint, PREFIX, strict)
    return replace(report, ignored=tuple(key.removeprefix(PREFIX) for key in named if key not in own))


def load_pretrained(model: StudentTeacher, checkpoint: Checkpoint, *, strict: bool = True) -> LoadReport:
    """Start training from a checkpoint: as much as it holds (`train.pretrained_model_path`).

    Student and teacher if it has both; else one network, or a backbone, for both: then the teacher is made a copy of
    the student.

    Raises:
        CheckpointError: as `load_network` and `load_backbone`.
    """
    if checkpoint.student is not None and checkpoint.teacher is not None:
        report = load_network(model.student, checkpoint, strict=strict)
        load_network(model.teacher, checkpoint, which="teacher", strict=strict)
        return report
    if checkpoint.kind == "backbone":
        report = load_backbone(model.student.backbone, checkpoint, strict=strict)
    else:
        which: Which = "student" if checkpoint.student is not None else "teacher"
        report = load_network(model.student, checkpoint, which=which, strict=strict)
    model.teacher.load_state_dict(model.student.state_dict())
    return report


def identify_architecture(backbone: Mapping[str, Tensor]) -> str | None:
    """Which of the thirteen architectures a backbone's state dict is of, by names and shapes; None if of none."""
    first = backbone.get("cls_token")
    if first is None or first.ndim != 3:
        return None
    depth = len({key.split(".")[1] for key in backbone if key.startswith("blocks.")})
    if "patch_embed.backbone.stem.0.weight" in backbone:
        family = "fan_hybrid"
    elif any(".mlp.mlp_v." in key for key in backbone):
        family = "fan"
    else:
        family = "vit"
    patch = backbone.get("patch_embed.proj.weight")
    stride = patch.shape[-1] if family == "vit" and patch is not None else 16
    wanted = (family, first.shape[-1], depth, stride)
    for architecture in ARCHITECTURES.values():
        if (architecture.family, architecture.width, architecture.depth, architecture.stride) == wanted:
            return architecture.name
    return None


def _find_weights(values: Any, name: str) -> tuple[State, dict[str, Any]]:
    """The dict of tensors in a file's content, and everything beside it."""
    if isinstance(values, Mapping):
        for key in _NESTED:
            inner = values.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                return _tensors(inner), {str(k): v for k, v in values.items() if k != key}
        state = _tensors(values)
        if state:
            return state, {str(k): v for k, v in values.items() if k not in state}
    raise CheckpointError(f"{name}: holds no weights: there is no dict of tensors in it, alone or under 'state_dict'")


def _tensors(mapping: Mapping[Any, Any]) -> State:
    return {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}


def _unwrap(state: State) -> State:
    """Names without the prefixes of wrappers that all of them share."""
    for prefix in _WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            return _unwrap(_within(state, prefix))
    return state


def _within(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load(module: nn.Module, state: State, checkpoint: Checkpoint, prefix: str, strict: bool) -> LoadReport:
    """Load ``state`` into ``module``, whose backbone's names begin with ``prefix``."""
    own = module.state_dict()
    given = dict(state)
    resampled = [] if prefix == PREFIX else _fit_position(given, own, f"{prefix}pos_embed")
    ignored = [
        key for key in given if key not in own and key.startswith(prefix) and _IGNORED.match(key.removeprefix(prefix))
    ]
    unexpected = [key for key in given if key not in own and key not in ignored]
    missing = [key for key in own if key not in given]
    misfits = [key for key in given if key in own and given[key].shape != own[key].shape]
    if strict and (missing or unexpected or misfits):
        raise CheckpointError(_explain(own, given, checkpoint, prefix, missing, unexpected, misfits))
    matched = {key: value for key, value in given.items() if key in own and key not in misfits}
    if not matched:
        raise CheckpointError(f"{checkpoint.source}: none of its {len(given)} tensors has a name of this model")
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.load_state_dict(matched, strict=False)
    return LoadReport(tuple(matched), tuple(ignored), (*missing, *misfits), (*unexpected, *misfits), tuple(resampled))


def _explain(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    prefix: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misfits: Sequence[str],
) -> str:
    """Why a checkpoint does not fit: another architecture, or else the names."""
    there, here = checkpoint.architecture, identify_architecture(_within(own, prefix))
    if there and here and there != here:
        return f"{checkpoint.source}: holds {there}, but the spec's model is {here}; set model.arch={there}"
    if checkpoint.stem == "conv" and f"{prefix}patch_embed.proj.weight" in own:
        return f"{checkpoint.source}: has the convolutional stem of the research code, and this model a plain one"
    parts = []
    if missing:
        parts.append(f"it lacks {_listed(missing)}")
    if unexpected:
        parts.append(f"the model has no {_listed(unexpected)}")
    if misfits:
        shapes = [f"{key} {list(given[key].shape)} (the model's: {list(own[key].shape)})" for key in misfits]
        parts.append(f"other shapes: {_listed(shapes)}")
    return f"{checkpoint.source}: does not fit the model of the spec: {'; '.join(parts)}"


def _fit_position(given: State, own: Mapping[str, Tensor], key: str) -> list[str]:
    """Bring a position embedding of another grid, or with other extra tokens, to the model's own, in place."""
    if key not in given or key not in own or given[key].shape == own[key].shape:
        return []
    position, target = given[key], own[key]
    if position.ndim != 3 or target.ndim != 3 or position.shape[-1] != target.shape[-1]:
        return []
    extra = next((n for n in (1, 2, 0) if math.isqrt(position.shape[1] - n) ** 2 == position.shape[1] - n), None)
    if extra is None:
        return []
    first, grid = position[:, : min(extra, 1)], position[:, extra:]  # of two, the second is distillation's
    if not extra:
        first = torch.zeros_like(position[:, :1])
    side = math.isqrt(target.shape[1] - 1)
    given[key] = resample_abs_pos_embed(torch.cat((first, grid), 1).float(), [side, side], num_prefix_tokens=1)
    return [key]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
