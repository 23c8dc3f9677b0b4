"""The spec of a job from what it is made of: base experiment, parent job, spec file, ``--specs`` and overrides.

Later ones win. A key that is null counts as not given, so that the ``default`` of ``mal get-job-schema`` can be handed
in as it is and a parent's checkpoint still finds its place.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mal import pretrained, storage
from mal.client.schema import SHARED_TRAIN_KEYS, base_values
from mal.errors import SpecError
from mal.spec.checks import check_task
from mal.spec.default_model import wants_default
from mal.spec.derived import Action, results_dir
from mal.spec.load import read_values, spec_to_values, task_spec
from mal.spec.schema import Spec


@dataclass(frozen=True)
class Sources:
    """What a spec is made of."""

    base_experiment: str | None = None
    parent: tuple[Action, Spec] | None = None
    """Task and spec of the parent job."""
    file: str | None = None
    specs: str | None = None
    """A spec as JSON."""
    overrides: Sequence[str] = ()
    encryption_key: str | None = None


def compose(action: Action, sources: Sources) -> Spec:
    """The spec of a job, complete, its paths absolute; the files it names are looked for on the cluster.

    Raises:
        SpecError: with every mistake.
    """
    specs = _given(_parsed(sources.specs)) if sources.specs else {}
    values = _layered(action, sources, specs)
    if wants_default(values, action):
        # A whole spec of mal get-job-schema does not choose what it holds as defaults: the built-in model may.
        values = _layered(action, sources, _chosen(specs, spec_to_values(Spec())))
    spec = with_absolute_paths(task_spec(values, action))
    check_task(spec, action, files=False)
    return spec


def _layered(action: Action, sources: Sources, specs: dict[str, Any]) -> dict[str, Any]:
    """All that is given, the later ones winning; ``specs`` is what ``sources.specs`` says."""
    layers = [
        base_values(sources.base_experiment, action) if sources.base_experiment else {},
        _inherited(action, *sources.parent) if sources.parent else {},
        _given(read_values(sources.file)),
        specs,
        _given(read_values(None, sources.overrides)),
        {"encryption_key": sources.encryption_key} if sources.encryption_key else {},
    ]
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merged(values, layer)
    return values


def _chosen(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without those that are the schema's defaults."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found[name] = _chosen(value, default)
        elif value != default or type(value) is not type(default):
            found[name] = value
    return found


def _parsed(specs: str) -> dict[str, Any]:
    try:
        values = json.loads(specs)
    except json.JSONDecodeError as error:
        raise SpecError(f"--specs: not valid JSON ({error}); a file goes with -e") from error
    if not isinstance(values, dict):
        raise SpecError("--specs: a spec is a JSON object of sections, such as the `default` of mal get-job-schema")
    return values


def _given(values: Any) -> Any:
    """``values`` without nulls."""
    if not isinstance(values, Mapping):
        return values
    return {name: _given(value) for name, value in values.items() if value is not None}


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        merged[name] = _merged(under, value) if isinstance(under, dict) and isinstance(value, Mapping) else value
    return merged


def checkpoint_of(action: Action, spec: Spec) -> str | None:
    """The checkpoint that a job of this spec made or used."""
    if action == "train":
        return storage.join(results_dir(spec, "train"), "mal_model_latest.pth")
    return spec.evaluate.checkpoint if action == "evaluate" else spec.inference.checkpoint


def _inherited(action: Action, parent_action: Action, parent: Spec) -> dict[str, Any]:
    """What a child takes over: results folder, data, network, and the checkpoint as its input."""
    values = _given(spec_to_values(parent))
    shared = {key: values["train"][key] for key in SHARED_TRAIN_KEYS}
    checkpoint = checkpoint_of(parent_action, parent)
    key = "pretrained_model_path" if action == "train" else "checkpoint"
    inherited = {name: values[name] for name in ("results_dir", "dataset", "model")} | {"train": shared}
    if action == "train":
        # A training into its parent's folder would be taken for the same one, which is done.
        inherited["results_dir"] = storage.join(values["results_dir"], "child")
    return _merged(inherited, {action: {key: checkpoint}})


def with_absolute_paths(spec: Spec) -> Spec:
    """The same spec with every path named independently of this process's working directory."""

    def absolute(section: Any) -> Any:
        changed = {}
        for spec_field in dataclasses.fields(section):
            name, value = spec_field.name, getattr(section, spec_field.name)
            if dataclasses.is_dataclass(value):
                changed[name] = absolute(value)
            elif (
                isinstance(value, str)
                and not pretrained.is_built_in(value)
                and (name.endswith(("_path", "_dir")) or name == "checkpoint")
            ):
                changed[name] = storage.absolute(value)
        return dataclasses.replace(section, **changed)

    return typing.cast(Spec, absolute(spec))
