"""``summary.json``: what a run was, to be understood a year later."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import mal
from mal import storage
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec

_PACKAGES = ("ray", "torch", "torchvision", "timm", "pyarrow", "numpy", "pillow", "pycocotools", "rlemasklib")


def write_summary(folder: str, task: str, spec: Spec, begun: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write and return the summary of a finished task.

    Args:
        begun: time.time() at the start.
        facts: counts, times per stage and paths of this task.
    """
    summary: dict[str, Any] = {
        "task": task,
        "begun": datetime.datetime.fromtimestamp(begun).astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun, 3),
        **facts,
        "versions": {
            "mal": mal.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "spec": spec_to_values(spec),
    }
    storage.write_bytes(storage.join(folder, "summary.json"), json.dumps(summary, indent=1).encode() + b"\n")
    return summary
