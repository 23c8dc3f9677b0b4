"""The figures of a labelling run that goes on: for the progress line, for ``status.json`` and as Ray metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mal.run.progress import Rate

METRICS = {
    "boxes_total": "boxes to be labelled, those of earlier attempts included",
    "boxes_done": "boxes labelled or rejected, those of earlier attempts included",
    "boxes_rejected": "boxes rejected since this attempt began",
    "boxes_per_second": "over the last minute",
    "boxes_per_second_mean": "since this attempt began",
    "seconds_left": "at the mean rate",
    "actors": "actors that are alive; before that is known, those that have finished a shard lately",
    "waiting_share": "part of the actors' time, over the last minute, in which the network waits for images, in 0..1",
}
"""Name -> meaning. Prometheus knows them as ``ray_mal_<name>``, with the run's folder as the tag ``run``."""

_LATELY_SECONDS = 60.0
_LATELY_SHARDS = 3.0


class LabellingFigures:
    """Counts what the actors report.

    Args:
        total, done: boxes in all, and those that earlier attempts did.
        clock: seconds; for tests.
    """

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.rejected = 0
        self._earlier = done
        self._clock = clock
        self._rate = Rate(clock)
        self._seen: dict[str, tuple[float, float]] = {}
        self.alive: int | None = None
        """Actors that are alive, if somebody has looked (`live_actors`)."""
        self._waits: deque[tuple[float, float, float]] = deque()  # when, seconds waited, seconds

    def add(self, report: Mapping[str, Any]) -> None:
        """Count a row of `mal.labelling.actor.REPORT`."""
        self._rate.add(report["boxes"])
        self.rejected += report["rejected"]
        now = self._clock()
        self._seen[report["actor"]] = (now, report["seconds"])
        self._waits.append((now, report["waited"], report["seconds"]))
        while now - self._waits[0][0] > _LATELY_SECONDS:
            self._waits.popleft()

    @property
    def actors(self) -> int:
        """Those alive, or that have finished a shard within the time of a few of theirs; one that died drops out."""
        if self.alive is not None:
            return self.alive
        now = self._clock()
        return sum(now - then <= _LATELY_SECONDS + _LATELY_SHARDS * took for then, took in self._seen.values())

    @property
    def waiting_share(self) -> float:
        """Of the shards that were reported within the last minute; NaN before the first."""
        worked = sum(seconds for _, _, seconds in self._waits)
        return sum(waited for _, waited, _ in self._waits) / worked if worked else math.nan

    def values(self) -> dict[str, float]:
        """By the names of METRICS; what is not known yet is NaN."""
        done = self._earlier + self._rate.done
        mean = self._rate.mean
        return {
            "boxes_total": float(self.total),
            "boxes_done": done,
            "boxes_rejected": float(self.rejected),
            "boxes_per_second": self._rate.now,
            "boxes_per_second_mean": mean,
            "seconds_left": (self.total - done) / mean if self._rate.done else math.nan,
            "actors": float(self.actors),
            "waiting_share": self.waiting_share,
        }


def live_actors(name: str) -> int | None:
    """Actors of this job that are alive and whose class has ``name`` in its name; None if Ray cannot tell now."""
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    wanted: list[Any] = [("state", "=", "ALIVE"), ("job_id", "=", context.get_job_id())]
    try:
        # By address: on a machine with several Rays it would not know which is meant.
        found = list_actors(context.gcs_address, wanted, limit=10_000, timeout=5, raise_on_missing_output=False)
    except (RayStateApiException, OSError, ValueError):  # no dashboard, or one that is busy
        return None
    return sum(name in (actor.class_name or "") for actor in found)


class RayMetrics:
    """Gauges of Ray that show the figures of a run. Needs a connection to Ray.

    Args:
        run: the run's folder, the tag of its figures.
        metrics: name -> meaning.
    """

    def __init__(self, run: str, metrics: Mapping[str, str] = METRICS) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run}
        self._gauges = {name: Gauge(f"mal_{name}", text, tag_keys=("run",)) for name, text in metrics.items()}

    def show(self, values: Mapping[str, float]) -> None:
        """Set them; a value that is not known is left as it was."""
        for name, value in values.items():
            if math.isfinite(value):
                self._gauges[name].set(value, self._tags)
