"""``status.json``: one JSON object a line that tells a person or a program how a task is doing."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Literal

from mal import storage
from mal.errors import MalError, RunPausedError
from mal.run import pause
from mal.run.lease import held

State = Literal["STARTED", "RUNNING", "SUCCESS", "FAILURE", "SKIPPED"]
_VERBOSITY = {"STARTED": "INFO", "RUNNING": "INFO", "SUCCESS": "INFO", "SKIPPED": "WARNING", "FAILURE": "ERROR"}


class StatusLog:
    """Appends to ``<folder>/status.json``."""

    def __init__(self, folder: str) -> None:
        self.path = storage.join(folder, "status.json")

    def write(self, state: State, message: str, kpi: Mapping[str, float] | None = None) -> None:
        """Add a line. ``kpi``: figures such as train_loss or mIoU; those that are not finite are left out."""
        now = datetime.datetime.now().astimezone()
        line: dict[str, object] = {
            "date": now.strftime("%m/%d/%Y"),
            "time": now.strftime("%H:%M:%S"),
            "status": state,
            "verbosity": _VERBOSITY[state],
            "message": message,
        }
        if kpi:
            line["kpi"] = {name: value for name, value in kpi.items() if math.isfinite(value)}
        storage.append_line(self.path, json.dumps(line, ensure_ascii=False))


@contextlib.contextmanager
def task_status(folder: str, task: str) -> Iterator[StatusLog]:
    """STARTED on entry; FAILURE on whatever leaves the block by an exception, Ctrl-C included; SKIPPED on a pause.

    The block itself writes SUCCESS, with its figures.

    Raises:
        RunMismatchError: on entry, if another run is at work in the folder; nothing is written then.
    """
    log = StatusLog(folder)
    with held(folder):
        pause.forget_earlier(folder)
        log.write("STARTED", f"{task} started")
        with _ending(log, task):
            yield log


@contextlib.contextmanager
def _ending(log: StatusLog, task: str) -> Iterator[None]:
    """Writes how the block ended, if it is by an exception."""
    try:
        yield
    except RunPausedError as error:
        log.write("SKIPPED", f"{task} {error}")
        raise
    except BaseException as error:
        message = str(error) if isinstance(error, MalError) else f"{type(error).__name__}: {error}"
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            message = "interrupted by the user; the same command goes on from here"
        try:
            log.write("FAILURE", f"{task} failed: {message}")
        except MalError as second:  # a full disk, say: the first error is the one to be shown
            print(f"status.json could not be written: {second}", file=sys.stderr)
        raise
