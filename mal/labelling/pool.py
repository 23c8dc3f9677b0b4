"""Ray Data: hand the shards that are not done yet to an elastic pool of actors, and count what comes back."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa

from mal import storage
from mal.errors import ClusterError, MalError
from mal.labelling.actor import LEFT, ShardLabeler
from mal.labelling.figures import LabellingFigures, RayMetrics, live_actors
from mal.labelling.task import LabelTask, Sealed
from mal.run.cluster import Cluster
from mal.run.progress import ProgressLine
from mal.run.room import Need
from mal.run.status import StatusLog
from mal.spec.derived import max_actors
from mal.spec.schema import PoolSpec, Spec

_ERROR_LINE = re.compile(r"(?!ray\.exceptions)[A-Za-z_][\w.]*(Error|Exception)(: |$)")
"""The last line of a Python traceback, but not one of Ray's own."""


@dataclass(frozen=True)
class PoolSize:
    """How many actors, and what each reserves."""

    least: int
    most: int
    cpus: float
    gpus: float

    def describe(self) -> str:
        what = "GPU" if self.gpus else "CPU"
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} {what} actor{'s' if self.most > 1 else ''}"


def pool_size(spec: Spec, pool: PoolSpec, cluster: Cluster, shards: int) -> PoolSize:
    """The pool for ``shards`` shards of work on the cluster at hand.

    Without a GPU, ``max_actors: 0`` means as many CPU actors as the cluster's CPUs carry.

    Raises:
        ClusterError: not even ``min_actors`` can ever run there.
    """
    most = max_actors(spec, pool)
    if not cluster.gpus and not pool.max_actors:
        most = max(most, int(cluster.worker_cpus // pool.cpus_per_actor))
    most = max(1, min(most, shards))
    if pool.decode == "nodes":
        most = _leave_cpus(most, pool, cluster)
    size = PoolSize(min(pool.min_actors, most), most, pool.cpus_per_actor, 1.0 if cluster.gpus else 0.0)
    cluster.check_room(Need("actor", size.least, size.cpus, size.gpus, "lower cpus_per_actor or min_actors"))
    return size


def _leave_cpus(most: int, pool: PoolSpec, cluster: Cluster) -> int:
    """At most ``most`` actors, so few that a CPU is left to decode for them; without one they would wait for ever."""
    fitting = int((cluster.cpus - 1) // pool.cpus_per_actor)
    if fitting < pool.min_actors:
        raise ClusterError(
            f"decode = nodes: a CPU is needed besides those of {pool.min_actors} actors with {pool.cpus_per_actor:g} "
            f"each, the cluster has {cluster.cpus:g} in all: lower cpus_per_actor or min_actors, add nodes, or let the "
            "actors decode"
        )
    return min(most, fitting)


def label_all(
    task: LabelTask,
    size: PoolSize,
    *,
    todo: list[int],
    boxes: int,
    boxes_done: int,
    status: StatusLog,
    labeler: type[ShardLabeler] = ShardLabeler,
) -> float:
    """Label the shards ``todo``; returns the seconds it took. It ends early, with shards missing, on a pause.

    Progress goes to the screen, to ``status``, and to Ray's metrics (`mal.labelling.figures`).

    Args:
        labeler: what the actors are; benchmarks and tests have their own.

    Raises:
        MalError: whatever stopped an actor.
    """
    figures = LabellingFigures(boxes, boxes_done)
    metrics = RayMetrics(storage.parent(task.shards_folder))

    def report(line: str) -> None:
        status.write("RUNNING", line, figures.values())
        figures.alive = live_actors(f"({labeler.__name__})")

    def people() -> str:
        return f"{figures.actors} actors, {figures.rejected} rejected"

    with ProgressLine("labelling", boxes, "boxes", already=boxes_done, on_line=report, describe=people) as progress:
        for row in _until_paused(_reports(task, size, todo, labeler)):
            figures.add(row)
            metrics.show(figures.values())
            progress.advance(row["boxes"])
        return progress.rate.seconds


def _until_paused(reports: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The reports of shards that were done, until every actor heard of has left a shard because of a pause."""
    heard: set[str] = set()
    stopped: set[str] = set()
    for row in reports:
        heard.add(row["actor"])
        if row["shard"] != LEFT:
            yield row
            continue
        stopped.add(row["actor"])
        if stopped == heard:  # nothing is at hand any more; the shards that are queued need not be gone through
            return


def _reports(task: LabelTask, size: PoolSize, todo: list[int], labeler: type[ShardLabeler]) -> Iterator[dict[str, Any]]:
    """Run the Ray Data pipeline; one report per finished shard, as they finish."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # One block per shard: nothing but its number travels; the actor reads the shard's rows from the index. (Not
    # from_arrow, which starts a task per block to look at it.)
    shards = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    dataset = shards.map_batches(
        labeler,
        batch_format="pyarrow",
        batch_size=1,
        fn_constructor_args=(Sealed(task),),
        num_cpus=size.cpus,
        num_gpus=size.gpus or None,
        compute=ActorPoolStrategy(
            min_size=size.least, max_size=size.most, initial_size=size.most, max_tasks_in_flight_per_actor=2
        ),
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for report in cast(pa.Table, batch).to_pylist():
                if report["error"] is not None:
                    raise cast(MalError, pickle.loads(report["error"]))
                yield report
    except ray.exceptions.RayError as error:
        raise explained(error) from error


def explained(error: BaseException) -> MalError:
    """The MalError behind an error of Ray's, or one that says what happened in a worker."""
    cause: BaseException | None = error
    last = error
    while cause is not None:
        if isinstance(cause, MalError):
            return cause
        last = cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = str(error).strip().splitlines() or [type(last).__name__]
    told = [line.strip() for line in lines if _ERROR_LINE.match(line.strip())] or [lines[-1].strip()]
    return MalError(f"a worker failed: {told[-1]}\n" + "\n".join(lines[-20:]))
