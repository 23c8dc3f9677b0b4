"""``summary.json``: what of a run is written down."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import mal
from mal.run import summary
from mal.run.cluster import describe_node
from mal.spec.load import load_spec

SECRET = "k3y-of-checkpoints"


def test_it_holds_what_is_needed_to_understand_a_run_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv(summary.COMMIT_VARIABLE, "abc123")
    now = [0.0]
    stages = summary.Stages(lambda: now[0])
    for name, seconds in (("index", 2.0), ("label", 3.0), ("index", 1.0)):
        now[0] += seconds
        stages.done(name)
    nodes = [describe_node({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 2.0**35, "node:x": 1.0})]
    spec = load_spec(None, [f"encryption_key={SECRET}", "dataset.crop_size=64"])
    summary.write_summary(str(tmp_path), "train", spec, 0.0, stages, nodes, {"boxes": 7})
    text = (tmp_path / "summary.json").read_text()
    found = json.loads(text)
    assert SECRET not in text
    assert found["seconds_by_stage"] == {"index": 3.0, "label": 3.0}
    assert found["nodes"] == [{"cpus": 8.0, "gpus": 2.0, "gpu": "H100", "memory_gb": 32.0}]
    assert (found["commit"], found["boxes"], found["spec"]["dataset"]["crop_size"]) == ("abc123", 7, 64)
    assert {"mal", "python", "ray", "torch"} <= found["versions"].keys()
    assert found["driver"]["memory_gb"] > 0


def test_a_node_without_a_gpu_has_no_kind_of_one():
    assert describe_node({"CPU": 2.0})["gpu"] is None


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv(summary.COMMIT_VARIABLE, raising=False)
    root = Path(mal.__file__).parents[1]
    found = summary.commit()
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert re.fullmatch(rf"{head}(\+changes)?", str(found))
    monkeypatch.setattr(mal, "__file__", str(tmp_path / "mal" / "__init__.py"))
    assert summary.commit() is None
