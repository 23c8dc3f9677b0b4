"""Training and evaluation with their results folder on an S3-compatible store: all that a run leaves is there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
from tiny_training import TINY, cut_blocks, make_batch, save_now, tiny_model, tiny_spec

from mal import storage
from mal.data.scenes import write_scenes
from mal.encryption import MAGIC
from mal.training.checkpoints import TrainingState, progress, resume
from mal.training.step import Moment, Stepper
from mal.training.task import TrainTask

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

BUCKET = "runs"
KEY = "k3y-of-checkpoints-51be"
BOTH = '''
"""Train and evaluate, on one Ray."""
import sys
from mal.cli import main
from mal.run.cluster import connected
from mal.spec.schema import RaySpec

with connected(RaySpec(num_cpus=4, object_store_gb=0.2)):
    for task in ("train", "evaluate"):
        code = main([task, *sys.argv[1:]])
        if code:
            sys.exit(code)
'''


@pytest.fixture
def bucket():
    """The environment that reaches an empty bucket, and the store as pyarrow sees it."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, moto.DomainDispatcherApplication(moto.create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    keys = {"access_key": "testing", "secret_key": "testing-secret"}
    store = pafs.S3FileSystem(**keys, endpoint_override=address, scheme="http", allow_bucket_creation=True)
    store.create_dir(BUCKET)
    store.delete_dir_contents(BUCKET)  # moto keeps what another server of this process was given
    yield (
        {
            "AWS_ACCESS_KEY_ID": keys["access_key"],
            "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{address}",
        },
        store,
    )
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ray_folder():
    """Ray's own files; its sockets' paths must be short."""
    with tempfile.TemporaryDirectory(prefix="mal-s3-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_training_and_evaluation_leave_all_they_know_in_the_bucket(bucket, ray_folder, tmp_path):
    """But for secrets: the key, here from the spec, is in no file, no log, no table of processes."""
    environment, store = bucket
    paths = write_scenes(str(tmp_path), images=8, seed=4, size=(160, 120))
    (tmp_path / "spec.yaml").write_text(f"encryption_key: {KEY}\n")
    (tmp_path / "both.py").write_text(BOTH)
    arguments = [
        *("-e", str(tmp_path / "spec.yaml"), f"results_dir=s3://{BUCKET}/run", *TINY),
        *(f"dataset.{split}_{what}" for split in ("train", "val") for what in _data(paths)),
        *("dataset.min_obj_size=100", "dataset.num_workers_per_gpu=0", "train.num_epochs=1", "train.batch_size=8"),
        *("train.loggers=[tensorboard,mlflow]", f"evaluate.checkpoint=s3://{BUCKET}/run/train/mal_model_latest.pth"),
        *("evaluate.shard_boxes=16", "evaluate.max_actors=1"),
    ]
    own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1", **environment}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(tmp_path / "both.py"), *arguments]
    with (tmp_path / "output").open("w+") as output:
        running = subprocess.Popen(command, env=inherited | own, stdout=output, stderr=subprocess.STDOUT)
        commands: set[bytes] = set()
        end = time.monotonic() + 500
        while running.poll() is None:
            assert time.monotonic() < end
            commands |= _commands()
            time.sleep(0.5)
    told = (tmp_path / "output").read_text()
    assert running.returncode == 0, told

    found = {info.path.removeprefix(f"{BUCKET}/run/") for info in _files(store)}
    assert {"train/mal_model_latest.pth", "train/model_epoch_000.pth", "train/mlflow.db"} <= found
    assert any(name.startswith("train/events/events.out") for name in found)
    for task in ("train", "evaluate"):
        lines = [json.loads(line) for line in _text(store, f"{task}/status.json").splitlines()]
        assert (lines[0]["status"], lines[-1]["status"]) == ("STARTED", "SUCCESS")
        summary = json.loads(_text(store, f"{task}/summary.json"))
        assert summary["spec"]["results_dir"] == f"s3://{BUCKET}/run"
        assert summary["nodes"]
    assert 0 <= json.loads(_text(store, "evaluate/metrics.json"))["mIoU"] <= 1
    texts = {name: _bytes(store, name) for name in found}
    texts |= {str(path): path.read_bytes() for path in ray_folder.rglob("logs/**/*") if path.is_file()}
    assert any("worker" in name for name in texts)
    assert any(b"both.py" in line for line in commands)
    texts |= {"output": told.encode(), "processes": b"\n".join(commands)}
    for name, text in texts.items():
        assert b"testing-secret" not in text, name
        assert KEY.encode() not in text, name
    assert texts["train/mal_model_latest.pth"].startswith(MAGIC)


def _commands() -> set[bytes]:
    """The command lines of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.add(path.read_bytes())
    return found


@pytest.mark.parametrize("key", [None, "open sesame"])
def test_shards_in_a_bucket_are_gone_on_from(bucket, monkeypatch, key):
    environment, store = bucket
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cut_blocks(monkeypatch)
    storage._remote_filesystem.cache_clear()  # of another server's address
    spec = dataclasses.replace(tiny_spec(), encryption_key=key)
    task = TrainTask(spec, f"s3://{BUCKET}/run/train", "", None, 1, False)
    stepper = _stepper(task)
    for step in (1, 2, 3):
        stepper.step([make_batch(step, 2)], Moment(0, step, 30))
        save_now(task, stepper, TrainingState(epoch=0, offset=2 * step, global_step=step))
    assert storage.list_folders(task.folder) == [f"model_epoch_000_step_0000000{step}.dcp" for step in (2, 3)]
    files = [info.path for info in _files(store)]
    assert len(files) == 6
    for name in files:
        assert _bytes(store, name.removeprefix(f"{BUCKET}/run/")).startswith(MAGIC) == bool(key)
    assert progress(task) == (0, 6)
    after = _stepper(task)
    assert resume(task, after.strategy, after.optimizer, after.scaler).global_step == 3
    batch, moment = make_batch(9, 2), Moment(0, 4, 30)
    assert stepper.step([batch], moment).tolist() == after.step([batch], moment).tolist()
    for p, q in zip(stepper.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q)
    storage._remote_filesystem.cache_clear()


def _stepper(task):
    return Stepper(task.spec, tiny_model(task.spec), torch.device("cpu"), 1)


def _data(paths):
    return f"ann_path={paths.annotations}", f"img_dir={paths.images}"


def _files(store):
    infos = store.get_file_info(pafs.FileSelector(f"{BUCKET}/run", recursive=True))
    return [info for info in infos if info.type == pafs.FileType.File]


def _bytes(store, name):
    with store.open_input_file(f"{BUCKET}/run/{name}") as file:
        return file.read()


def _text(store, name):
    return _bytes(store, name).decode()
