"""Pausing a run: a file named ``pause`` in its results folder asks it to stop once the work at hand is saved.

The file's content says which attempt is meant (the id of a submitted job); an empty file means whatever runs there. A
run removes a file that was meant for an earlier attempt when it begins, so that a paused run can be gone on with.
"""

from __future__ import annotations

import os

from mal import storage
from mal.errors import RunPausedError

FILE = "pause"
ATTEMPT_VARIABLE = "MAL_JOB_ID"
"""Environment variable with the id of the submitted job that this process is; not set in a run by hand."""


def pause_path(folder: str) -> str:
    """The pause file of the run in ``folder`` (a task's results folder)."""
    return storage.join(folder, FILE)


def ask(folder: str, attempt: str = "") -> None:
    """Ask the run in ``folder`` to pause; only its attempt ``attempt``, if one is named."""
    storage.write_bytes(pause_path(folder), attempt.encode())


def forget_earlier(folder: str) -> None:
    """Remove a pause file that is not meant for the attempt that begins now."""
    path = pause_path(folder)
    attempt = os.environ.get(ATTEMPT_VARIABLE, "")
    if storage.exists(path) and not (attempt and storage.read_bytes(path).decode().strip() == attempt):
        storage.delete(path)


def asked(folder: str) -> bool:
    """Whether the run in ``folder`` was asked to pause."""
    return storage.exists(pause_path(folder))


def paused(done: str) -> RunPausedError:
    """The error that ends a paused run; ``done`` says how far it came."""
    return RunPausedError(f"paused, {done}; the same command (or mal resume-job) goes on from here")
