"""JSON Schema of the spec, and base experiments: they agree with what the spec accepts."""

from __future__ import annotations

import dataclasses
import json
import typing

import jsonschema
import pytest

from mal.architectures import ARCHITECTURES
from mal.cli import main
from mal.client.schema import base_experiments, base_values, job_schema
from mal.errors import SpecError
from mal.spec.derived import ACTIONS
from mal.spec.load import spec_from_values, spec_to_values
from mal.spec.schema import Spec


def _leaves(schema, path=()):
    for name, part in schema["properties"].items():
        if "properties" in part:
            yield from _leaves(part, (*path, name))
        else:
            yield (*path, name), part


def _nested(path, value):
    for name in reversed(path):
        value = {name: value}
    return value


@pytest.mark.parametrize("action", ACTIONS)
def test_the_default_is_a_whole_valid_spec(action):
    schema = job_schema(action)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(schema["default"], schema)
    assert spec_from_values(schema["default"]) == Spec()
    for path, part in _leaves(schema):
        assert part["description"].strip(), path
        assert part["title"], path


@pytest.mark.parametrize("action", ACTIONS)
def test_only_sections_that_the_action_reads_are_there(action):
    sections = set(job_schema(action)["properties"])
    assert {"dataset", "model", "results_dir", action} <= sections
    assert not ({"evaluate", "inference", "ray"} - {action}) & sections
    if action != "train":
        assert set(job_schema(action)["properties"]["train"]["properties"]) == {"mask_thres", "test_margin_rate"}


def test_every_key_of_the_spec_is_in_some_schema():
    found = {path for action in ACTIONS for path, _ in _leaves(job_schema(action))}
    sections = {f.name: h for f, h in zip(dataclasses.fields(Spec), typing.get_type_hints(Spec).values(), strict=True)}
    for name, hint in sections.items():
        keys = [f.name for f in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []
        for path in [(name, key) for key in keys] or [(name,)]:
            assert path in found or name == "ray", path


def _wrong_values(part):
    """Values that the schema of one key forbids."""
    item = part.get("items", part)
    wrap = (lambda v: [v] * part["minItems"]) if part["type"] == "array" else (lambda v: v)
    if "enum" in item:
        yield wrap("nonsense")
    if "minimum" in item:
        yield wrap(item["minimum"] - 1)
    if "maximum" in item:
        yield wrap(item["maximum"] + 1)
    if "exclusiveMinimum" in item:
        yield wrap(item["exclusiveMinimum"])
    yield {"a": "mapping"}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_the_schema_forbids_the_spec_refuses(action):
    schema = job_schema(action)
    tried = 0
    for path, part in _leaves(schema):
        for value in _wrong_values(part):
            values = _nested(path, value)
            assert not jsonschema.Draft202012Validator(schema).is_valid(values), path
            with pytest.raises(SpecError, match=path[-1]):
                spec_from_values(values)
            tried += 1
    assert tried > 30
    assert not jsonschema.Draft202012Validator(schema).is_valid({"dataset": {"corp_size": 3}})


def test_the_encryption_key_is_never_part_of_a_default():
    assert "encryption_key" not in job_schema("train")["default"]
    assert job_schema("train")["properties"]["encryption_key"]["writeOnly"] is True


def test_base_experiments_can_be_started_from(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    found = base_experiments(str(tmp_path))
    assert found[0]["id"] == Spec().model.arch
    assert {entry["architecture"] for entry in found} == {*ARCHITECTURES, None}
    assert [entry["id"] for entry in found][-1] == str(tmp_path / "model.pth")
    for entry in found:
        spec = spec_from_values(base_values(entry["id"], "train"))
        if entry["architecture"]:
            assert spec.model.arch == entry["architecture"]
            assert spec.model.pretrained == (entry["weights"] is not None)
        else:
            assert spec.train.pretrained_model_path == entry["id"]
    with pytest.raises(SpecError, match="list-base-experiments"):
        base_values("vit-nothing/3", "train")


def test_the_commands_print_json(capsys):
    assert main(["list-base-experiments"]) == 0
    first = json.loads(capsys.readouterr().out)[0]["id"]
    assert main(["get-job-schema", "--action", "train", "--base-experiment-id", first]) == 0
    default = json.loads(capsys.readouterr().out)["default"]
    assert default["model"] == spec_to_values(Spec())["model"] | {"pretrained": True}
    assert main(["get-job-schema", "--action", "train", "--base-experiment-id", "nonsense"]) == 2
