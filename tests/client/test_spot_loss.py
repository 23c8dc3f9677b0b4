"""A spot node goes while a labelling and a training job of the job server run on it: both finish all the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from head_node import head_node, kill_node, worker_node

from mal.data.scenes import write_scenes
from mal.model.network import build_network
from mal.spec.load import load_spec

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = [
    "dataset.crop_size=64",
    "dataset.min_obj_size=100",
    "dataset.num_workers_per_gpu=0",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
]
WAIT_SECONDS = 400


@pytest.fixture(scope="module")
def head():
    folder = Path(tempfile.mkdtemp(prefix="mal"))  # short, for Ray's sockets
    with head_node(folder, cpus=0) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def _wait(what, condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} is not there"
        time.sleep(0.2)
    return found


@pytest.fixture
def mal(head, monkeypatch):
    """Run a verb; returns the JSON that it prints."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))

    def run(*arguments):
        command = [sys.executable, "-m", "mal.cli", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def _ended(mal, job_id):
    """The job's metadata, once it has ended."""

    def look():
        found = mal("get-job-metadata", "--job-id", job_id)
        return found if found["status"] not in ("PENDING", "RUNNING") else None

    return _wait(f"the end of {job_id}", look)


def test_both_jobs_outlive_one_of_two_nodes(head, mal, tmp_path):
    paths = write_scenes(str(tmp_path), images=60, seed=6, size=(160, 120))
    torch.manual_seed(1)
    torch.save(build_network(load_spec(None, SMALL).model, crop_size=64).state_dict(), tmp_path / "network.pth")
    with worker_node(head, cpus=4) as spot, worker_node(head, cpus=4):
        train = mal(
            *("create-job", "--action", "train", "--name", "t", *SMALL, f"results_dir={tmp_path}"),
            *(f"dataset.train_ann_path={paths.annotations}", f"dataset.train_img_dir={paths.images}"),
            *("train.num_gpus=2", "train.num_epochs=3", "train.batch_size=4", "train.crf_num_iter=3"),
            *("train.checkpoint_interval_unit=step", "train.checkpoint_interval=12"),
        )["id"]
        _wait("a checkpoint", lambda: list((tmp_path / "train").glob("model_*")))
        label = mal(  # only now: training takes longer to begin than all of this takes
            *("create-job", "--action", "inference", "--name", "l", *SMALL, f"results_dir={tmp_path}"),
            *(f"inference.ann_path={paths.annotations}", f"inference.img_dir={paths.images}"),
            *(f"inference.checkpoint={tmp_path}/network.pth", "inference.shard_boxes=2", "inference.max_actors=2"),
        )["id"]
        shards = tmp_path / "inference" / "shards"
        _wait("a shard", lambda: list(shards.glob("part-*.parquet")))
        before = len(list(shards.glob("part-*.parquet")))
        kill_node(spot)
        for job_id in (label, train):
            ended = _ended(mal, job_id)
            assert ended["status"] == "SUCCEEDED", ended["message"]
        assert head.nodes() == 2, "the head and the node that was left"
    given = json.loads(Path(paths.annotations).read_text())["annotations"]
    labels = json.loads((tmp_path / "inference" / "labels.json").read_text())["annotations"]
    assert sorted(a["id"] for a in labels) == sorted(a["id"] for a in given)
    assert before < len(list(shards.glob("part-*.parquet"))), "all was done before the node went"
    content = torch.load(tmp_path / "train" / "mal_model_latest.pth", weights_only=True)
    assert (content["epoch"], content["offset"]) == (3, 0)
    for task in ("inference", "train"):
        lines = [json.loads(line)["status"] for line in (tmp_path / task / "status.json").read_text().splitlines()]
        assert (lines.count("STARTED"), lines[-1]) == (1, "SUCCESS"), "it went on by itself"
