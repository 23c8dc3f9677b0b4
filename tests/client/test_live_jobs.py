"""The job verbs against a real head node over HTTP: what they print, what becomes of the jobs, what stays secret."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from head_node import head_node

from mal.data.scenes import write_scenes
from mal.model.network import build_network
from mal.spec.load import load_spec

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = [
    "dataset.crop_size=128",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=16",
    "model.mask_head_out_channel=16",
    "inference.shard_boxes=1",
    "inference.batch_size=1",
    "inference.max_actors=1",
    "inference.cpus_per_actor=0.5",
]
SECRETS = {"MAL_ENCRYPTION_KEY": "k3y-of-checkpoints-7f1c", "AWS_SECRET_ACCESS_KEY": "aws-s3cr3t-0d9e"}
HUB_TOKEN = "hub-t0ken-55aa"
WAIT_SECONDS = 240


@pytest.fixture(scope="module")
def head():
    # Ray's socket names must be short, and pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix="mal"))
    with head_node(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(head, monkeypatch):
    """This process as a client of the head."""
    for name in ("RAY_API_SERVER_ADDRESS", *SECRETS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Overrides that label some three hundred boxes, with a random network."""
    folder = tmp_path_factory.mktemp("boxes")
    paths = write_scenes(str(folder), images=60, seed=6, size=(160, 120))
    torch.manual_seed(1)
    network = build_network(load_spec(None, SMALL).model, crop_size=128)
    torch.save(network.state_dict(), folder / "network.pth")
    inputs = [f"inference.ann_path={paths.annotations}", f"inference.img_dir={paths.images}"]
    return [*inputs, f"inference.checkpoint={folder}/network.pth", *SMALL]


def _mal(*arguments, environment=None):
    """``mal`` in a process of its own: Ray reads mode and token once per process, and other tests use other ones."""
    command = [sys.executable, "-m", "mal.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def call(here):
    """Run a verb; returns exit code, the JSON on stdout (None: nothing there) and stderr."""

    def run(*arguments):
        ran = _mal(*arguments)
        return ran.returncode, json.loads(ran.stdout) if ran.stdout else None, ran.stderr

    return run


def _wait(call, job_id, wanted, seconds=WAIT_SECONDS):
    """The job's metadata once its status is one of ``wanted``."""
    deadline = time.monotonic() + seconds
    while True:
        _, found, _ = call("get-job-metadata", "--job-id", job_id)
        if found["status"] in wanted:
            return found
        ended = found["status"] in ("SUCCEEDED", "FAILED", "STOPPED", "PAUSED")
        if ended or time.monotonic() > deadline:
            logs = call("get-job-logs", "--job-id", job_id)[1]["logs"]
            raise AssertionError(f"{found['status']} instead of {wanted}: {found['message']}\n{logs}")
        time.sleep(0.5)


def _shards(results: Path) -> int:
    return len(list((results / "inference" / "shards").glob("part-*.parquet")))


def _wait_for_shards(results: Path, count: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while _shards(results) < count:
        assert time.monotonic() < deadline, f"{_shards(results)} shards"
        time.sleep(0.1)


def _labels(results: Path) -> list[dict]:
    return json.loads((results / "inference" / "labels.json").read_text())["annotations"]


def test_a_labelling_job_paused_killed_cancelled_and_resumed_gives_what_an_undisturbed_one_does(
    call, head, boxes, tmp_path, monkeypatch
):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    create = ["create-job", "--action", "inference", "--kind", "experiment"]
    code, made, _ = call(*create, "--name", "plain", *boxes, f"results_dir={undisturbed}")
    assert code == 0
    _wait(call, made["id"], ["SUCCEEDED"])

    # Secrets come by the environment and by the runtime env; the server must not know them.
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    runtime_env = tmp_path / "runtime_env.yaml"
    runtime_env.write_text(f"env_vars:\n  HF_TOKEN: {HUB_TOKEN}\n  OMP_WAIT_POLICY: passive\n")
    environment = ["--runtime-env", str(runtime_env), "--secret-env", "AWS_SECRET_ACCESS_KEY"]
    code, made, err = call(*create, "--name", "Label all!", *environment, *boxes, f"results_dir={disturbed}")
    assert code == 0, err
    job = made["id"]
    assert (code, made["action"], job.rpartition("-")[0]) == (0, "inference", "label-all")
    _wait_for_shards(disturbed, 3)
    assert call("delete-job", "--job-id", job)[0] == 1
    assert call("resume-job", "--job-id", job, *environment)[0] == 1
    assert call("pause-job", "--job-id", job)[1] == {"id": job, "status": "PAUSING"}
    paused = _wait(call, job, ["PAUSED"])
    after_pause, total = _shards(disturbed), len(_labels(undisturbed))
    assert 3 <= after_pause < total
    assert not list((disturbed / "inference" / "shards").glob(".*.part")), "the work at hand was saved"
    assert "paused" in call("get-job-logs", "--job-id", job)[1]["logs"]
    assert paused["secrets"] == ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MAL_ENCRYPTION_KEY"]
    assert json.loads((disturbed / "inference" / "status.json").read_text().splitlines()[-1])["status"] == "SKIPPED"

    # Secrets are not kept for the resumption.
    code, _, err = call("resume-job", "--job-id", job, "--secret-env", "AWS_SECRET_ACCESS_KEY")
    assert code == 2
    assert "HF_TOKEN: not set" in err
    assert call("resume-job", "--job-id", job, *environment)[1]["attempt"] == 2
    _wait_for_shards(disturbed, after_pause + 3)
    _kill_driver(f"{job}.2")
    assert _wait(call, job, ["FAILED"])["exit_code"] != 0

    assert call("resume-job", "--job-id", job, *environment)[1]["attempt"] == 3
    _wait_for_shards(disturbed, _shards(disturbed) + 3)
    assert call("cancel-job", "--job-id", job)[1] == {"id": job, "status": "STOPPING"}
    _wait(call, job, ["STOPPED"])
    last = json.loads((disturbed / "inference" / "status.json").read_text().splitlines()[-1])
    assert (last["status"], "goes on from here" in last["message"]) == ("FAILURE", True)
    assert call("cancel-job", "--job-id", job)[0] == 1
    assert _shards(disturbed) < total, "everything was done before it could be disturbed: use more boxes"

    call("resume-job", "--job-id", job, *environment)
    done = _wait(call, job, ["SUCCEEDED"])
    assert [a["status"] for a in done["attempts"]] == ["PAUSED", "FAILED", "STOPPED", "SUCCEEDED"]
    assert _labels(disturbed) == _labels(undisturbed)
    _check_secrets(head, job)

    listed = call("list-jobs")[1]
    assert [entry["name"] for entry in listed] == ["Label all!", "plain"]
    assert call("delete-job", "--job-id", job)[1]["deleted"]
    assert [entry["name"] for entry in call("list-jobs")[1]] == ["plain"]
    assert _labels(disturbed)


def _kill_driver(submission: str) -> None:
    """SIGKILL the process of an attempt."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if command[1:3] == [b"-m", b"mal.client.entry"] and f"MAL_JOB_ID={submission}".encode() in variables:
                os.kill(int(folder.name), signal.SIGKILL)
                return
    raise AssertionError(f"no process of {submission}")


def _check_secrets(head, job: str) -> None:
    """Grep for the secrets in all that the server returns, and in Ray's logs."""
    attempts = [job, f"{job}.2", f"{job}.3", f"{job}.4"]
    paths = ["/api/jobs/", "/api/cluster_status", "/nodes?view=details", "/api/component_activities"]
    paths += [f"/api/jobs/{a}{what}" for a in attempts for what in ("", "/logs")]
    kinds = ("actors", "tasks", "workers", "runtime_envs", "jobs", "nodes")
    paths += [f"/api/v0/{kind}?detail=1&limit=10000" for kind in kinds]
    texts = {}
    for path in paths:
        with contextlib.suppress(urllib.error.HTTPError):
            texts[path] = head.get(path)
    assert {"/api/jobs/", f"/api/jobs/{job}", f"/api/jobs/{job}/logs", "/api/v0/runtime_envs?detail=1&limit=10000"} <= (
        texts.keys()
    )
    assert "HF_TOKEN" in texts[f"/api/jobs/{job}"], "the names of secrets may be seen, so this looks at the right place"
    logs = [p for p in head.folder.rglob("logs/**/*") if p.is_file()]
    assert logs
    texts |= {str(p): p.read_text(errors="replace") for p in logs}
    for secret in (*SECRETS.values(), HUB_TOKEN, head.token):
        assert [where for where, text in texts.items() if secret in text] == []


def test_a_failing_job_says_why(call, boxes, tmp_path):
    arguments = ["--action", "inference", "--name", "fails", *boxes, f"results_dir={tmp_path}"]
    _, made, _ = call("create-job", *arguments, "inference.ann_path=/nowhere/boxes.json")
    failed = _wait(call, made["id"], ["FAILED"])
    assert failed["exit_code"] == 2
    assert "/nowhere/boxes.json" in failed["message"]
    followed = _mal("get-job-logs", "--job-id", made["id"], "--follow")
    assert followed.returncode == 1
    lines = [json.loads(line) for line in followed.stdout.splitlines()]
    assert any("there is no such file" in line.get("log", "") for line in lines)
    assert lines[-1] == {"status": "FAILED"}
    code, _, err = call("pause-job", "--job-id", made["id"])
    assert (code, "has ended (FAILED)" in err) == (1, True)


def test_a_wrong_spec_is_refused_with_all_its_mistakes_before_anything_is_submitted(call):
    before = call("list-jobs")[1]
    code, out, err = call("create-job", "--action", "train", "--name", "x", "train.lr=-1", "dataset.crop=3")
    assert (code, out) == (2, None)
    assert "train.lr = -1" in err
    assert "dataset.crop = 3: unknown key" in err
    assert call("list-jobs")[1] == before


def test_an_unknown_job_is_named(call):
    code, _, err = call("get-job-metadata", "--job-id", "nobody-1")
    assert (code, "nobody-1" in err, "list-jobs" in err) == (1, True, True)


def _list_jobs(head, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    return _mal("list-jobs", "--address", head.address, environment=variables)


def test_without_a_token_or_with_a_wrong_one_the_error_says_what_to_set(head, tmp_path):
    without = _list_jobs(head, RAY_AUTH_MODE="disabled")
    assert (without.returncode, without.stdout) == (1, "")
    assert "wants a token" in without.stderr
    assert "Set RAY_AUTH_MODE=token" in without.stderr
    wrong = tmp_path / "token"
    wrong.write_text("00" * 32)
    refused = _list_jobs(head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "missing or wrong" in refused.stderr
    assert "00" * 32 not in refused.stderr
    right = _list_jobs(head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(head.token_file))
    assert right.returncode == 0


def test_a_wrong_address_is_named(call):
    code, out, err = call("list-jobs", "--address", "http://127.0.0.1:9")
    assert (code, out) == (1, None)
    assert "http://127.0.0.1:9: no job server answers there" in err
    assert call("list-jobs", "--address", "ray://127.0.0.1:9")[0] == 1
