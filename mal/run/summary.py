"""``summary.json``: what a run was, to be understood a year later."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mal
from mal import storage
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec

COMMIT_VARIABLE = "MAL_GIT_COMMIT"
"""Names the commit where the code is not in a checkout: in a submitted job, in an image."""
_PACKAGES = ("ray", "torch", "torchvision", "timm", "pyarrow", "numpy", "pillow", "pycocotools", "rlemasklib")


class Stages:
    """Seconds of a run's stages, one after the other."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self.seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        """What was done since the last call, or since the beginning, was ``name``."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def write_summary(
    folder: str,
    task: str,
    spec: Spec,
    begun: float,
    stages: Stages,
    nodes: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write and return the summary of a finished task.

    Args:
        begun: time.time() at the start.
        nodes: the cluster's, as of `mal.run.cluster.Cluster.hardware`; empty if none was needed.
        facts: counts and paths of this task.
    """
    summary: dict[str, Any] = {
        "task": task,
        "begun": datetime.datetime.fromtimestamp(begun).astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun, 3),
        "seconds_by_stage": {name: round(seconds, 3) for name, seconds in stages.seconds.items()},
        **facts,
        "commit": commit(),
        "versions": {
            "mal": mal.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "driver": {"system": platform.platform(), "cpus": os.cpu_count(), "memory_gb": _memory_gb()},
        "nodes": list(nodes),
        "spec": spec_to_values(spec),
    }
    storage.write_bytes(storage.join(folder, "summary.json"), json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def commit() -> str | None:
    """The git commit of this package, with ``+changes`` if files differ from it; None if it is in no checkout."""
    given = os.environ.get(COMMIT_VARIABLE)
    folder = Path(mal.__file__).parents[1]
    if given or not (folder / ".git").exists():
        return given or None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the folder
        return None


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
