"""The commands of the productised peer's documentation work with ``mal`` for ``tao mal``; paths stand for its ids."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from mal.cli import main
from mal.client import commands, jobs
from mal.spec.load import spec_from_values

KEY = "nvidia_tlt"


@pytest.fixture
def documentation(shared_dir):
    return (shared_dir / "seeds" / "mask_auto_labeler_docs.txt").read_text()


class Server:
    """A job server that takes every job; its only parent has succeeded."""

    def __init__(self, address=None):
        self.address = address


@pytest.fixture
def orders(monkeypatch):
    """What would be submitted."""
    taken = []
    monkeypatch.setattr(commands, "JobServer", Server)
    monkeypatch.setattr(jobs, "create", lambda server, order: taken.append(order) or f"{order.name}-1")
    monkeypatch.setattr(commands, "_parent", lambda server, job_id: Parent(taken[0]))
    return taken


class Parent:
    def __init__(self, order):
        self.action, self.spec = order.action, order.spec


def _printed(arguments, capsys):
    """What ``mal`` prints as JSON."""
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def _created(documentation, action, variables):
    """The arguments of the documented ``create-job`` of an action."""
    written = re.search(rf"\$\((tao mal create-job[^|]*--action {action}[^|]*)\| jq -r '\.id'\)", documentation)
    assert written, action
    text = re.sub(r"\$(\w+)", lambda m: variables[m.group(1)], written.group(1).replace("\\\n", " "))
    words = shlex.split(re.sub(r"'\"'([^']*)'\"'", r'"\1"', text))
    assert words[:2] == ["tao", "mal"]
    return words[2:]


def test_schema_train_evaluate_and_label_as_documented(documentation, orders, capsys, tmp_path):
    assert "tao mal list-base-experiments | jq -r '.[0].id'" in documentation
    base = _printed(["list-base-experiments"], capsys)[0]["id"]
    assert "tao mal get-job-schema --action train --base-experiment-id $BASE_EXPERIMENT_ID" in documentation
    specs = {}
    for action in ("train", "evaluate", "inference"):
        arguments = ["get-job-schema", "--action", action, "--base-experiment-id", base]
        specs[action] = _printed(arguments, capsys)["default"]
        spec_from_values(specs[action])
    data = {"train_ann_path": "/d/train.json", "train_img_dir": "/d/train", "val_ann_path": "/d/val.json"}
    for action in ("train", "evaluate"):
        specs[action]["dataset"] |= data | {"val_img_dir": "/d/val"}
    specs["inference"]["inference"] |= {"ann_path": "/d/boxes.json", "img_dir": "/d/images"}
    variables = {"WORKSPACE_ID": "w", "DATASET_ID": "d", "BASE_EXPERIMENT_ID": base, "TRAIN_JOB_ID": "mal_train-1"}
    for action in ("train", "evaluate", "inference"):
        # Quotes in the JSON are the shell's business: shlex sees the variable's value as the shell would hand it over.
        variables[f"{action.upper()}_SPECS"] = f"@{action}"
        arguments = _created(documentation, action, variables)
        arguments[arguments.index(f"@{action}")] = json.dumps(specs[action])
        assert _printed(arguments, capsys)["id"] == f"mal_{action}-1"
    train, evaluate, inference = orders
    assert train.spec.model.pretrained
    assert evaluate.spec.evaluate.checkpoint == "/results/train/mal_model_latest.pth"
    assert inference.spec.inference.checkpoint == "/results/train/mal_model_latest.pth"
    for order in orders:
        assert order.environment.secret["MAL_ENCRYPTION_KEY"] == KEY
        assert KEY not in json.dumps(order.environment.public)
        assert order.spec.encryption_key is None


def test_ignored_ids_are_named(documentation, orders, capsys):
    data = {"dataset": {"train_ann_path": "/d/t.json", "train_img_dir": "/d/t"}}
    arguments = ["create-job", "--action", "train", "--name", "n", "--specs", json.dumps(data), "--workspace-id", "w"]
    assert main(arguments) == 0
    assert "--workspace-id is ignored: there are no workspaces here" in capsys.readouterr().err


# The documented spec names files that are not here, and no checkpoint: that is said, and no key of it is unknown.
MISSING = {
    "train": "there is no such file",
    "evaluate": "give a checkpoint of your own: evaluate.checkpoint=PATH",
    "inference": "give a checkpoint of your own: inference.checkpoint=PATH",
}


@pytest.mark.parametrize("task", MISSING)
def test_the_tasks_take_the_documented_arguments(documentation, task, tmp_path, capsys):
    assert f"tao model mal {task} [-h] -e <experiment" in documentation
    with pytest.raises(SystemExit) as caught:
        main([task, "-h"])
    assert caught.value.code == 0
    assert "-e SPEC" in capsys.readouterr().out
    spec = tmp_path / "spec.yaml"
    sample = documentation[documentation.index("strategy: 'fsdp'") : documentation.index("Parameter |")]
    spec.write_text(_indented(sample))
    assert main([task, "-e", str(spec), f"{task}.gpu_ids=[0,1]", f"{task}.num_gpus=2"]) == 2
    error = capsys.readouterr().err
    assert MISSING[task] in error
    assert "unknown key" not in error


def _indented(sample: str) -> str:
    """The sample spec with the indentation that the text of the documentation has lost."""
    sections = ("dataset:", "inference:", "model:", "train:")
    lines, inside = [], False
    for line in sample.splitlines():
        inside = inside or line in sections
        lines.append(line if line in sections or not inside else f"  {line}")
    return "\n".join(lines) + "\n"
