"""The door of training: indexes, Ray Train workers, progress, status."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mal.errors
from mal import storage
from mal.data.index import build_index
from mal.data.training_set import load_training_boxes
from mal.errors import MalError, TrainingError
from mal.labelling.figures import RayMetrics
from mal.run import pause
from mal.run.cluster import Cluster, connected
from mal.run.progress import ProgressLine
from mal.run.room import Need
from mal.run.status import StatusLog, task_status
from mal.run.summary import Stages, write_summary
from mal.spec.checks import check_task
from mal.spec.derived import results_dir, train_workers
from mal.spec.schema import Spec
from mal.training.board import NAME, Board
from mal.training.checkpoints import progress
from mal.training.figures import METRICS, figures, of_validation
from mal.training.loggers import RunLogs, check_installed, open_runs
from mal.training.preemption import sigterm_pauses
from mal.training.task import TrainTask
from mal.training.worker import train_worker

_POLL_SECONDS = 0.5
RESIZE_SECONDS = 60.0
"""Elastic training looks this often for nodes that have come; taking them in costs the steps since a checkpoint."""


def run_training(spec: Spec) -> dict[str, Any]:
    """Train as the spec says, going on from the latest checkpoint of the train folder, if any.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        SpecError: before anything is started.
        RunPausedError: training was asked to pause.
        MalError: whatever stopped training.
    """
    check_task(spec, "train")
    check_installed(spec.train.loggers)
    folder = results_dir(spec, "train")
    storage.make_folder(folder)
    with task_status(folder, "training") as status:
        begun, stages = time.time(), Stages()
        train_index, val_index, boxes = _indexes(spec, folder)
        stages.done("index")
        with connected(spec.ray) as cluster:
            workers, use_gpu = train_workers(spec), cluster.gpus > 0
            _check_room(spec, cluster, workers)
            seed = spec.train.seed if spec.train.seed >= 0 else secrets.randbelow(2**31)
            task = TrainTask(spec, folder, train_index, val_index, workers, use_gpu, seed)
            storage.delete(task.fatal)
            # A checkpoint that cannot be gone on from stops it here, before any worker is started.
            epochs, samples = progress(task)
            what = "GPU" if use_gpu else "CPU"
            note = "" if use_gpu else " (this cluster has no GPU)"
            least = f"{spec.train.min_workers} to " if spec.train.min_workers else ""
            print(f"training on {least}{workers} {what} worker{'s' if workers > 1 else ''}{note}: {folder}", flush=True)
            if epochs < spec.train.num_epochs:
                stages.done("start")
                with (
                    open_runs(task, partial(_say, status)) as runs,
                    _progress(task, boxes, epochs, samples, status, runs) as board,
                    sigterm_pauses(folder),
                ):
                    _fit(task, board)
                stages.done("train")
        epochs, samples = progress(task)
        if epochs < spec.train.num_epochs and pause.asked(folder):
            more = f" and {samples:,} boxes of the next one" if samples else ""
            raise pause.paused(f"{epochs} of {spec.train.num_epochs} epochs{more} are done")
        facts = {"boxes": boxes, "epochs": epochs, "workers": workers, "checkpoint": task.latest}
        summary = write_summary(folder, "train", spec, begun, stages, cluster.hardware, facts)
        status.write("SUCCESS", f"training finished: {task.latest}")
        print(f"checkpoint: {task.latest}")
        return summary


def _indexes(spec: Spec, folder: str) -> tuple[str, str | None, int]:
    """Folders of the training and the validation index, and the boxes trained on; built unless they are there."""
    data = spec.dataset
    train = build_index(
        data.train_ann_path or "", storage.join(folder, "index"), max_image_pixels=data.max_image_pixels
    )
    boxes = load_training_boxes(train.folder, data.min_obj_size, data.max_obj_size)
    print(boxes, flush=True)
    if data.val_ann_path is None or not data.load_mask:
        return train.folder, None, len(boxes)
    val_folder = storage.join(folder, "validation", "index")
    val = build_index(data.val_ann_path, val_folder, load_mask=True, max_image_pixels=data.max_image_pixels)
    return train.folder, val.folder, len(boxes)


def _check_room(spec: Spec, cluster: Cluster, workers: int) -> None:
    """Raise ClusterError if the workers, or the fewest that elastic training takes, can never be started here."""
    remedy = "lower train.num_gpus, train.num_nodes or train.cpus_per_worker"
    gpus = 1.0 if cluster.gpus else 0.0
    cluster.check_room(
        Need("training worker", spec.train.min_workers or workers, spec.train.cpus_per_worker, gpus, remedy)
    )


def _say(status: StatusLog, line: str) -> None:
    status.write("RUNNING", line)
    print(line, flush=True)


def _fit(task: TrainTask, board: Any) -> None:
    """Run the workers until training is done. Raises what stopped them."""
    import ray.exceptions
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from mal.training.signals import HearSigterm

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    filesystem, path = storage.resolve(task.folder)
    train = task.spec.train
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1.0} if task.use_gpu else {})
    least = train.min_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task, "board": board},
        torch_config=TorchConfig(backend="nccl" if task.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg] # a checker sees the old class
            num_workers=(least, task.workers) if least else task.workers,  # type: ignore[arg-type] # likewise
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=task.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg] # likewise
            # Checkpoints are ours, in the train folder; Ray's own records of an attempt go beside them.
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=f"{path}/ray",
            storage_filesystem=filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            callbacks=[HearSigterm()],  # type: ignore[list-item] # likewise
        ),
    )
    try:
        trainer.fit()
    except (ray.exceptions.RayError, ray.train.TrainingFailedError, RuntimeError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        what = "\n".join(lines[-25:])
        raise _noted(task) or TrainingError(f"a training worker failed: {what}") from error
    noted = _noted(task)
    if noted is not None:
        raise noted


def _noted(task: TrainTask) -> MalError | None:
    """The error that a worker left a note of, if any."""
    if not storage.exists(task.fatal):
        return None
    note = json.loads(storage.read_bytes(task.fatal))
    kind = getattr(mal.errors, note["kind"], TrainingError)
    return typing.cast(MalError, kind(note["message"]))


@contextmanager
def _progress(
    task: TrainTask, boxes: int, epochs: int, samples: int, status: StatusLog, runs: RunLogs
) -> Iterator[Any]:
    """A board for the workers, and a thread that shows what they write on it, and hands it to the loggers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: on another node it would go with that node, and training with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"{NAME}-{time.time_ns()}", "scheduling_strategy": here}
    board: Any = ray.remote(num_cpus=0)(Board).options(**options).remote()
    # An epoch is filled up to whole batches of all workers.
    train = task.spec.train
    batch = train.batch_size * train.accum_grad_batches * task.workers
    per_epoch = -(-boxes // batch) * batch
    total, already = per_epoch * train.num_epochs, per_epoch * epochs + samples
    stop = threading.Event()
    metrics = RayMetrics(task.folder, METRICS)
    with ProgressLine("training", total, "boxes", already=already) as line:

        def show() -> None:
            while True:
                last = stop.is_set()
                for note in ray.get(board.take.remote()):
                    if note["kind"] == "steps":
                        line.advance(note["boxes"], f"loss {note['loss']:.4f}")
                        done, now = already + line.rate.done, line.rate.now
                        metrics.show(figures(done, per_epoch, now, note["loss"], note["waiting"]))
                        runs.steps(note["first_step"], note["losses"], note["rate"])
                    else:
                        status.write("RUNNING", note["message"], note["kpi"])
                        metrics.show(of_validation(note["kpi"]))
                        runs.epoch(note["step"], note["kpi"])
                        print(note["message"], flush=True)
                if last:
                    return
                stop.wait(_POLL_SECONDS)

        thread = threading.Thread(target=show, name="training-progress", daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join(timeout=30)
