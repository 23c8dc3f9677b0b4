"""The hook by which Ray Train has every worker hear SIGTERM."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from mal.training.preemption import hear_sigterm


class HearSigterm(WorkerGroupCallback):
    """Sets the handler in every worker. Python allows that in a process's main thread only, which is Ray's.

    One of Ray's own kind of callbacks (`RunConfig.callbacks`): they alone reach that thread.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(hear_sigterm)
