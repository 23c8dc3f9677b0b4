"""A task without a checkpoint gets the built-in model, with the settings that it needs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mal import pretrained
from mal.errors import SpecError
from mal.spec.derived import Action, section
from mal.spec.schema import ModelSpec, Spec

_POOLS = ("inference", "evaluate")
_NOT_THE_CHECKPOINTS = ("frozen_stages", "pretrained", "vit_dpr", "teacher_momentum", "strict")
"""Keys of the section `model` that only training reads, or only loading."""

Values = dict[str, Any]


def wants_default(values: Mapping[str, Any], action: Action) -> bool:
    """Whether ``action`` needs a checkpoint, and ``values`` name none, or the built-in one."""
    if action == "train":
        return False
    named = _get(values, f"{action}.checkpoint")
    return named == pretrained.CHECKPOINT or (named is None and pretrained.is_there())


def with_default_model(values: Mapping[str, Any], action: Action, own: Spec) -> Values:
    """``values``, which `wants_default`, with the built-in model and its settings.

    Test-time options that are given win over those that the model was measured with, and a `quality_path` over its
    calibration.

    Args:
        values: what the user gave, as nested mappings.
        own: the spec of ``values`` alone.

    Raises:
        SpecError: with every given key that contradicts what the checkpoint needs.
        CheckpointError: the built-in model is incomplete.
    """
    model = pretrained.default_model()
    filled: Values = copy.deepcopy(dict(values))
    problems = []
    for key, needed in _needs(model):
        given = None if _get(values, key) is None else _of(own, key)
        if given is not None and given != (tuple(needed) if isinstance(needed, list) else needed):
            problems.append(
                f"{key} = {_get(values, key)!r}: the built-in model {model.name} needs {needed!r}; leave the key out, "
                f"or give a checkpoint of your own: {action}.checkpoint=PATH"
            )
        _set(filled, key, needed)
    if problems:
        raise SpecError(problems)
    for option, value in _options(model, action).items():
        if option not in (values.get(action) or {}):
            _set(filled, f"{action}.{option}", value)
    _set(filled, f"{action}.checkpoint", pretrained.CHECKPOINT)
    if section(own, action).quality_path is None:  # type: ignore[union-attr] # no section of training
        _set(filled, f"{action}.quality_path", pretrained.QUALITY)
    return filled


def _needs(model: pretrained.DefaultModel) -> Iterator[tuple[str, Any]]:
    """Keys and values that the checkpoint needs; what is not said of its network has the schema's default."""
    named = {key: value for key, value in model.settings.items() if key.partition(".")[0] not in _POOLS}
    network = {
        f"model.{name}": getattr(ModelSpec(), name)
        for name in ModelSpec.__dataclass_fields__
        if name not in _NOT_THE_CHECKPOINTS
    }
    yield from {**network, **named}.items()


def _options(model: pretrained.DefaultModel, action: Action) -> Values:
    """The test-time options for one of the two tasks; what is said for the other alone holds for both."""
    found: Values = {}
    for pool in sorted(_POOLS, key=lambda pool: pool == action):
        prefix = f"{pool}."
        found |= {k.removeprefix(prefix): v for k, v in model.settings.items() if k.startswith(prefix)}
    return found


def _get(values: Mapping[str, Any], key: str) -> Any:
    """What stands under a dotted key; None if nothing does."""
    found: Any = values
    for name in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def _of(spec: Spec, key: str) -> Any:
    found: Any = spec
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _set(values: Values, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for part in sections:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[name] = value
