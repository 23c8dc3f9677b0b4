"""MLflow and Weights & Biases: what they are told, offline; the same run is gone on with; no secret; no harm done."""

from __future__ import annotations

import importlib.util
import json
import time
import types
import warnings

import pytest

from mal import storage
from mal.errors import SpecError, TrainingError
from mal.training import loggers
from mal.training.loggers import RunLogs, check_installed, open_runs

SECRET = "k3y-of-checkpoints-1f"
FIRST = [[3.0, 2.0, 1.0], [2.5, 1.5, 1.0]]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        yield


def _train_twice(task, said, interrupted=lambda: None):
    """Two steps and an epoch, then a third step after an interruption; ``interrupted`` looks at it in between."""
    with pytest.raises(KeyboardInterrupt), open_runs(task, said.append) as runs:
        runs.steps(0, FIRST, 1e-4)
        runs.epoch(2, {"train_loss": 2.5, "mIoU": 0.25})
        raise KeyboardInterrupt
    interrupted()
    with open_runs(task, said.append) as runs:
        runs.steps(2, [[2.0, 1.0, 1.0]], 1e-5)


def _mlflow_run(folder, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        for name in ("loss/total", "learning_rate", "epoch/mIoU")
    }
    return client.get_run(run_id), history


def test_mlflow_gets_parameters_and_scalars_and_goes_on_in_the_same_run(train_task):
    task, said = train_task("train.loggers=[mlflow]", f"encryption_key={SECRET}"), []
    states = []

    def run_id():
        return json.loads(storage.read_bytes(f"{task.folder}/loggers.json"))["mlflow"]

    _train_twice(task, said, lambda: states.append(_mlflow_run(task.folder, run_id())[0].info.status))
    assert states == ["FAILED"]
    assert said == [f"mlflow: run {run_id()}"] * 2
    run, history = _mlflow_run(task.folder, run_id())
    assert history["loss/total"] == [(0, 3.0), (1, 2.5), (2, 2.0)]
    assert history["learning_rate"] == [(1, 1e-4), (2, 1e-5)]
    assert history["epoch/mIoU"] == [(2, 0.25)]
    assert run.data.params["train.batch_size"] == "2"
    assert run.data.params["model.arch"] == '"vit-deit-tiny/16"'
    assert run.info.status == "FINISHED"
    assert SECRET.encode() not in storage.read_bytes(f"{task.folder}/mlflow.db")


def test_a_train_folder_on_an_object_store_gets_a_copy_of_the_data_base(train_task, monkeypatch):
    task, said = train_task("train.loggers=[mlflow]"), []
    remote = types.SimpleNamespace(**{**vars(storage), "local_path": lambda path: None})  # as for s3://
    monkeypatch.setattr(loggers, "storage", remote)
    _train_twice(task, said)
    assert len(set(said)) == 1
    _, history = _mlflow_run(task.folder, said[0].removeprefix("mlflow: run "))
    assert history["loss/total"] == [(0, 3.0), (1, 2.5), (2, 2.0)]


def _records(file):
    """The records of a file of LevelDB's log format, which W&B's offline files are after seven bytes of their own."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:  # what is left of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def _wandb_history(folder):
    """Rows that were logged, of all offline parts of the runs in ``folder``, by run id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        rows = []
        for data in _records(file):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        found.setdefault(file.stem.removeprefix("run-"), []).extend(rows)
    return found


def test_wandb_gets_the_same_offline(train_task, tmp_path):
    task, said = train_task("train.loggers=[wandb]", f"encryption_key={SECRET}"), []
    _train_twice(task, said)
    run_id = json.loads(storage.read_bytes(f"{task.folder}/loggers.json"))["wandb"]
    assert said == [f"wandb: run {run_id}"] * 2
    wanted, deadline = [(0, 3.0), (1, 2.5), (2, 2.0)], time.monotonic() + 60
    while True:  # its own process writes the file, on a busy machine a little after the run's end
        history = _wandb_history(tmp_path / "train")
        assert set(history) == {run_id}
        losses = [(r["step"], r["loss/total"]) for r in history[run_id] if "loss/total" in r]
        if losses == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert losses == wanted
    assert [r["epoch/mIoU"] for r in history[run_id] if "epoch/mIoU" in r] == [0.25]
    files = [path for path in (tmp_path / "train").rglob("*") if path.is_file()]
    assert any(b"vit-deit-tiny/16" in path.read_bytes() for path in files)
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_one_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(SpecError) as caught:
        check_installed(["tensorboard", "mlflow", "wandb"])
    assert "mlflow is not installed: pip install mlflow-skinny sqlalchemy alembic" in str(caught.value)
    assert "wandb is not installed: pip install wandb" in str(caught.value)


def test_one_that_cannot_begin_stops_training_at_once(train_task, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with (
        pytest.raises(TrainingError, match="mlflow cannot begin a run"),
        open_runs(train_task("train.loggers=[mlflow]"), print),
    ):
        pass


class Broken:
    id = "1"

    def scalars(self, step, values):
        raise ConnectionError("the server is gone")

    def flush(self):
        raise AssertionError("it was given up")

    close = flush


class Counting:
    id = "2"
    seen = 0
    end = None

    def scalars(self, step, values):
        self.seen += 1

    def flush(self):
        pass

    def close(self, end):
        self.end = end


def test_one_that_fails_on_the_way_is_given_up_and_said_so_and_the_others_go_on():
    said, other = [], Counting()
    runs = RunLogs({"mlflow": Broken(), "wandb": other}, said.append)
    runs.steps(0, FIRST, 1e-4)
    runs.epoch(2, {"train_loss": 2.5})
    runs.close("done")
    assert said == ["mlflow fails, and is left out from here on: the server is gone"]
    assert (other.seen, other.end) == (4, "done")


def test_parameters_are_flat_and_within_mlflows_bounds(train_task):
    values = loggers.parameters(train_task())
    assert values["train.optim_betas"] == "[0.9, 0.9]"
    assert all("key" not in name and len(value) < 6000 for name, value in values.items())
