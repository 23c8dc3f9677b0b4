"""MLflow and Weights & Biases: parameters, losses per step and scores per validation, written by the driver.

Asked for by ``train.loggers``; TensorBoard, the default, is `mal.training.events`. The ids of the runs are kept in
``loggers.json`` of the train folder, so that a training which is gone on with goes on in the same runs. Without a
server in the environment both write into the train folder: MLflow to ``mlflow.db`` (``mlflow ui --backend-store-uri
sqlite:///.../mlflow.db``), Weights & Biases to ``wandb/`` (``wandb sync``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mal import storage
from mal.errors import SpecError, TrainingError
from mal.run import pause
from mal.spec.load import spec_to_values
from mal.training.task import TrainTask

PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic", "wandb": "wandb"}
"""Logger -> what pip installs for it."""
LOSSES = ("loss/total", "loss/mil", "loss/crf")
_MLFLOW_BATCH = 100

End = Literal["done", "paused", "failed"]


class RunLog(Protocol):
    """A run on a logger's side."""

    id: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimiser step."""

    def flush(self) -> None:
        """Hand over what was collected."""

    def close(self, end: End) -> None:
        """The run ends, or is interrupted."""


def check_installed(loggers: Sequence[str]) -> None:
    """Raise SpecError for a logger whose package is missing here."""
    missing = [name for name in loggers if name in PACKAGES and importlib.util.find_spec(name) is None]
    problems = [
        f"train.loggers: {name} is not installed: pip install {PACKAGES[name]} (or 'mal-on-ray[loggers]')"
        for name in missing
    ]
    if problems:
        raise SpecError(problems)


class RunLogs:
    """All runs of a training. A logger that fails on the way is given up, and said so: it does not stop training.

    Args:
        logs: by name.
        say: told what went wrong.
    """

    def __init__(self, logs: Mapping[str, RunLog], say: Callable[[str], None]) -> None:
        self._logs = dict(logs)
        self._say = say

    def steps(self, first: int, losses: Sequence[Sequence[float]], rate: float) -> None:
        """``losses`` [steps, 3], in the order of LOSSES, of the steps from ``first`` on; ``rate`` is the last one's."""

        def tell(log: RunLog) -> None:
            for place, values in enumerate(losses):
                log.scalars(first + place, dict(zip(LOSSES, values, strict=True)))
            log.scalars(first + len(losses) - 1, {"learning_rate": rate})

        self._each(tell)

    def epoch(self, step: int, scores: Mapping[str, float]) -> None:
        """The figures at the end of an epoch."""
        self._each(lambda log: log.scalars(step, {f"epoch/{name}": value for name, value in scores.items()}))
        self._each(lambda log: log.flush())

    def close(self, end: End) -> None:
        self._each(lambda log: log.close(end))

    def _each(self, call: Callable[[RunLog], None]) -> None:
        for name, log in list(self._logs.items()):
            try:
                call(log)
            except Exception as error:  # noqa: BLE001  whatever a tracking server may cause
                del self._logs[name]
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._say(f"{name} fails, and is left out from here on: {reason}")


@contextlib.contextmanager
def open_runs(task: TrainTask, say: Callable[[str], None]) -> Iterator[RunLogs]:
    """The runs of ``train.loggers`` for the length of a block: begun, or gone on with.

    Raises:
        TrainingError: a run cannot be begun.
    """
    makers: dict[str, Callable[[TrainTask, str | None], RunLog]] = {"mlflow": MlflowRun, "wandb": WandbRun}
    ids_path = storage.join(task.folder, "loggers.json")
    ids: dict[str, str] = json.loads(storage.read_bytes(ids_path)) if storage.exists(ids_path) else {}
    logs: dict[str, RunLog] = {}
    for name in (name for name in task.spec.train.loggers if name in makers):
        try:
            logs[name] = makers[name](task, ids.get(name))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(f"train.loggers: {name} cannot begin a run: {reason}") from error
        ids[name] = logs[name].id
        storage.write_bytes(ids_path, json.dumps(ids).encode())
        say(f"{name}: run {logs[name].id}")
    runs = RunLogs(logs, say)
    end: End = "failed"
    try:
        yield runs
        end = "paused" if pause.asked(task.folder) else "done"
    finally:
        runs.close(end)


def parameters(task: TrainTask) -> dict[str, str]:
    """The spec without secrets, by dotted key."""

    def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", json.dumps(value)

    return dict(flat(spec_to_values(task.spec), "")) | {"workers": str(task.workers), "seed": str(task.seed)}


class MlflowRun:
    """A run of MLflow, on ``MLFLOW_TRACKING_URI`` or in ``mlflow.db`` of the train folder."""

    def __init__(self, task: TrainTask, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._target = storage.join(task.folder, "mlflow.db")
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._collected: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's own, about what it calls itself
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or self._own_store())
            self.id = run_id or self._begin(task)
            self._client.update_run(self.id, status="RUNNING")

    def _own_store(self) -> str:
        """The data base in the train folder; for an object store one here, which is copied there."""
        local = storage.local_path(self._target)
        if local is None:
            self._spool = tempfile.TemporaryDirectory(prefix="mal-mlflow-")
            local = Path(self._spool.name, "mlflow.db")
            if storage.exists(self._target):
                local.write_bytes(storage.read_bytes(self._target))
        return f"sqlite:///{local}"

    def _begin(self, task: TrainTask) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mal")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"mal.folder": task.folder}
        run = self._client.create_run(experiment, run_name=storage.name(storage.parent(task.folder)), tags=tags)
        values = [Param(key, value) for key, value in parameters(task).items()]
        for start in range(0, len(values), _MLFLOW_BATCH):
            self._client.log_batch(run.info.run_id, params=values[start : start + _MLFLOW_BATCH])
        return str(run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._collected += [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._collected) >= _MLFLOW_BATCH:
            self._hand_over()

    def _hand_over(self) -> None:
        for start in range(0, len(self._collected), _MLFLOW_BATCH):
            self._client.log_batch(self.id, metrics=self._collected[start : start + _MLFLOW_BATCH])
        self._collected = []

    def flush(self) -> None:
        self._hand_over()
        if self._spool:
            storage.write_bytes(self._target, Path(self._spool.name, "mlflow.db").read_bytes())

    def close(self, end: End) -> None:
        self._hand_over()
        states = {"done": "FINISHED", "paused": "SCHEDULED", "failed": "FAILED"}
        self._client.set_terminated(self.id, status=states[end])
        self.flush()
        if self._spool:
            self._spool.cleanup()


class WandbRun:
    """A run of Weights & Biases; offline without a key (``WANDB_API_KEY``, ``wandb login``) and ``WANDB_MODE``."""

    def __init__(self, task: TrainTask, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        local = storage.local_path(task.folder)
        self._target = storage.join(task.folder, "wandb")
        self._spool = tempfile.TemporaryDirectory(prefix="mal-wandb-") if local is None else None
        self._folder = Path(self._spool.name if self._spool else str(local))
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mal"),
            name=storage.name(storage.parent(task.folder)),
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(self._folder),
            config=parameters(task),
        )
        self.id = str(self._run.id)
        # Our own counter: a training that goes on from a checkpoint does some steps a second time.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """It hands over by itself."""

    def close(self, end: End) -> None:
        self._run.finish(exit_code=1 if end == "failed" else 0)
        if self._spool:
            for file in (path for path in (self._folder / "wandb").rglob("*") if path.is_file()):
                relative = file.relative_to(self._folder / "wandb")
                storage.write_bytes(storage.join(self._target, *relative.parts), file.read_bytes())
            self._spool.cleanup()
