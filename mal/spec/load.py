"""From a YAML file and ``section.key=value`` overrides to a checked `Spec`, reporting every mistake at once.

OmegaConf reads the YAML, the overrides and ``${...}`` references; the types, bounds and names are checked here, because
its structured configs stop at the first mistake.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from mal import storage
from mal.errors import SpecError, StorageError
from mal.spec.default_model import wants_default, with_default_model
from mal.spec.derived import Action
from mal.spec.schema import Spec

T = TypeVar("T")


def load_spec(path: str | None, overrides: Sequence[str] = (), action: Action | None = None) -> Spec:
    """Read a spec file (None: all defaults) with overrides such as ``train.lr=1e-5``.

    Args:
        action: the task it is for; one that needs a checkpoint, when none is given, gets the built-in model.

    Raises:
        SpecError: with every mistake: unknown keys, wrong types, values out of bounds, unreadable YAML.
        CheckpointError: the built-in model is wanted and incomplete.
    """
    return task_spec(read_values(path, overrides), action)


def task_spec(values: Mapping[str, Any], action: Action | None) -> Spec:
    """As `load_spec`, from what `read_values` gives."""
    spec = spec_from_values(values)
    if action is None or not wants_default(values, action):
        return spec
    return spec_from_values(with_default_model(values, action, spec))


def read_values(path: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that a spec file and overrides give, as nested mappings, references resolved, otherwise unchecked.

    Raises:
        SpecError: unreadable YAML or overrides.
    """
    config = OmegaConf.merge(_read_yaml(path), _read_overrides(overrides))
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except omegaconf.errors.OmegaConfBaseException as error:
        raise SpecError(f"{path or 'overrides'}: {_first_line(error)}") from error


def spec_from_values(values: Any) -> Spec:
    """A `Spec` from nested mappings, e.g. those of `spec_to_values`. Raises SpecError with every mistake."""
    problems: list[str] = []
    spec = _build(Spec, values, "", problems)
    if problems or spec is None:
        raise SpecError(problems)
    return spec


def spec_to_values(spec: Any) -> dict[str, Any]:
    """Nested plain mappings, without the encryption key: a spec that is saved or shown never holds it."""
    values = dataclasses.asdict(spec)
    values.pop("encryption_key", None)
    return typing.cast(dict[str, Any], _plain(values))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _read_yaml(path: str | None) -> omegaconf.DictConfig:
    if path is None:
        return OmegaConf.create({})
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except (StorageError, UnicodeDecodeError) as error:
        raise SpecError(f"spec file {error}" if isinstance(error, StorageError) else f"{path}: not UTF-8") from error
    try:
        config = OmegaConf.create(text)
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, omegaconf.DictConfig):
        raise SpecError(f"{path}: a spec is a mapping of sections, such as 'train:'; this file holds a list")
    return config


def _read_overrides(overrides: Sequence[str]) -> omegaconf.DictConfig:
    problems = [
        f"'{text}': an override is written section.key=value" for text in overrides if "=" not in text.lstrip("=")
    ]
    if problems:
        raise SpecError(problems)
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
        raise SpecError(f"overrides {' '.join(overrides)}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _build(cls: type[T], values: Any, prefix: str, problems: list[str]) -> T | None:
    """An instance of the dataclass ``cls`` from ``values``; mistakes are added to ``problems``."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.')} = {values!r}: it must be a section of keys")
        return None
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for unknown in [str(k) for k in values if str(k) not in fields]:
        near = difflib.get_close_matches(unknown, fields, n=1)
        remedy = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(fields))}"
        problems.append(f"{prefix}{unknown} = {_shown(unknown, values[unknown])}: unknown key; {remedy}")
    found: dict[str, Any] = {}
    for name, spec_field in fields.items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(hints[name]):
            found[name] = _build(typing.cast(type, hints[name]), values[name], f"{prefix}{name}.", problems)
            continue
        value, mistake = _convert(values[name], hints[name])
        mistake = mistake or _out_of_bounds(value, spec_field.metadata)
        if mistake:
            problems.append(f"{prefix}{name} = {_shown(name, values[name])}: {mistake}")
        found[name] = value
    return None if problems else cls(**found)


def _shown(name: str, value: Any) -> str:
    return "(hidden)" if "key" in name or "token" in name or "secret" in name else repr(value)


def _convert(value: Any, hint: Any) -> tuple[Any, str | None]:
    """``value`` as the type ``hint``, and what is wrong with it, if anything."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return (None, None) if value is None else _convert(value, inner)
    if value is None:
        return None, f"it must not be empty; give {_type_name(hint)} or leave the key out"
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        items = [_convert(v, element) for v in (value if isinstance(value, (list, tuple)) else [value])]
        mistake = next((m for _, m in items if m), None)
        return tuple(v for v, _ in items), mistake and f"{mistake}, in a list"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value), None
    if hint is int and is_number and float(value).is_integer():
        return int(value), None
    if hint is str and is_number:
        return str(value), None
    if hint in (bool, str) and isinstance(value, hint):
        return value, None
    return value, f"it must be {_type_name(hint)}"


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, "a list of numbers")


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> str | None:
    """What is wrong with ``value`` by the bounds of `mal.spec.schema.key`, or None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        if "length" in bounds and len(value) != bounds["length"]:
            return f"it must be a list of {bounds['length']}"
        if not value:
            return "it must not be an empty list"
        return next((m for m in (_out_of_bounds(v, bounds) for v in value) if m), None)
    if "choices" in bounds and value not in bounds["choices"]:
        return f"it must be one of {', '.join(map(repr, bounds['choices']))}"
    if "low" in bounds and not value >= bounds["low"]:
        return f"it must be at least {bounds['low']:g}"
    if "above" in bounds and not value > bounds["above"]:
        return f"it must be more than {bounds['above']:g}"
    if "high" in bounds and not value <= bounds["high"]:
        return f"it must be at most {bounds['high']:g}"
    return None
