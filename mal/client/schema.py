"""JSON Schema of the spec of one task, and the base experiments that a training can start from."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from mal import storage
from mal.architectures import ARCHITECTURES, DEFAULT, get_architecture
from mal.errors import SpecError
from mal.spec.derived import ACTIONS, Action
from mal.spec.document import meanings
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec

SHARED_TRAIN_KEYS = ("mask_thres", "test_margin_rate")
"""Keys of the section `train` that evaluation and inference read too."""
_SCRATCH = ":scratch"
_CHECKPOINT_ENDINGS = (".pth", ".safetensors")


def job_schema(action: Action, base_experiment: str | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the keys that ``action`` reads, with titles, descriptions, bounds and defaults.

    ``default`` of the whole is a complete spec to start from: of the base experiment, if one is named.

    Raises:
        SpecError: no such base experiment.
    """
    schema = _section(Spec, f"Spec of a MAL {action} job", _own(action))
    default = _only(spec_to_values(Spec()), schema)
    for section, values in (base_values(base_experiment, action) if base_experiment else {}).items():
        default[section] |= values
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "default": default}


def _own(action: Action) -> dict[str, tuple[str, ...] | None]:
    """Section -> its keys that count (None: all); sections that do not are missing. ``ray`` starts a local Ray only."""
    sections = [f.name for f in dataclasses.fields(Spec) if f.name not in (*ACTIONS, "ray")]
    own: dict[str, tuple[str, ...] | None] = dict.fromkeys([*sections, action])
    if action != "train":
        own["train"] = SHARED_TRAIN_KEYS
    return own


def _only(values: Any, schema: dict[str, Any]) -> Any:
    """``values`` without what the schema has no place for."""
    if "properties" not in schema:
        return values
    return {name: _only(values[name], part) for name, part in schema["properties"].items() if name in values}


def _section(cls: Any, title: str, only: dict[str, tuple[str, ...] | None] | None = None) -> dict[str, Any]:
    """The schema of a dataclass. ``only``: names to keep, and of their keys which."""
    hints, lines, properties = typing.get_type_hints(cls), meanings(cls), {}
    for spec_field in dataclasses.fields(cls):
        name = spec_field.name
        if only is not None and name not in only:
            continue
        if dataclasses.is_dataclass(hints[name]):
            keys = only.get(name) if only else None
            properties[name] = _section(hints[name], name, dict.fromkeys(keys) if keys else None)
            properties[name]["description"] = lines[name]
        else:
            properties[name] = _key(name, hints[name], spec_field, lines[name])
    return {"title": title, "type": "object", "properties": properties, "additionalProperties": False}


def _key(name: str, hint: Any, spec_field: dataclasses.Field[Any], meaning: str) -> dict[str, Any]:
    """The schema of one value."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    inner = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    is_list = typing.get_origin(inner) is tuple
    bounds = spec_field.metadata
    names = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
    value: dict[str, Any] = {"type": kinds[typing.get_args(inner)[0] if is_list else inner]}
    value |= {names[bound]: limit for bound, limit in bounds.items() if bound in names}
    if "choices" in bounds:
        value["enum"] = list(bounds["choices"])
    if is_list:
        length = bounds.get("length")
        value = {"type": "array", "items": value, "minItems": length or 1} | ({"maxItems": length} if length else {})
    if optional:
        value["type"] = [value["type"], "null"]
    shown = {"title": name.replace("_", " "), "description": meaning, **value}
    if name == "encryption_key":
        return shown | {"writeOnly": True}
    default = spec_field.default
    return shown | {"default": list(default) if isinstance(default, tuple) else default}


def base_experiments(checkpoints: str | None = None) -> list[dict[str, Any]]:
    """What a training can start from, the default first: architectures with public weights, all of them without, and
    the checkpoints in the folder ``checkpoints``. Each has an ``id`` for ``--base-experiment-id``.
    """
    found: list[dict[str, Any]] = []
    for name in sorted(ARCHITECTURES, key=lambda name: name != DEFAULT):
        weights = ARCHITECTURES[name].pretrained
        if weights:
            found.append({"id": name, "architecture": name, "weights": f"timm/{weights}"})
    found += [{"id": f"{name}{_SCRATCH}", "architecture": name, "weights": None} for name in ARCHITECTURES]
    for file in storage.list_files(checkpoints) if checkpoints else []:
        if file.endswith(_CHECKPOINT_ENDINGS):
            path = storage.absolute(storage.join(checkpoints or "", file))
            found.append({"id": path, "architecture": None, "weights": path})
    return found


def base_values(base_experiment: str, action: Action) -> dict[str, dict[str, Any]]:
    """The keys that a base experiment sets. An id is an architecture, one with ``:scratch``, or a checkpoint's path.

    Raises:
        SpecError: it is none of these.
    """
    if base_experiment.endswith(_CHECKPOINT_ENDINGS):
        key = "pretrained_model_path" if action == "train" else "checkpoint"
        return {action: {key: storage.absolute(base_experiment)}}
    name = base_experiment.removesuffix(_SCRATCH)
    if not name.startswith("timm/"):
        try:
            has_weights = get_architecture(name).pretrained is not None
        except SpecError as error:
            raise SpecError(
                f"base experiment {base_experiment!r}: there is none of this name; mal list-base-experiments shows them"
            ) from error
    else:
        has_weights = True
    return {"model": {"arch": name, "pretrained": has_weights and name == base_experiment and action == "train"}}
