"""Jobs on a cluster: created, watched, cancelled, paused and gone on with.

A job is a spec and an action with an id. Each time it is begun or resumed it becomes one submission to Ray, an
*attempt*: ``ID``, ``ID.2``, ``ID.3`` ... All that is known of a job is kept in the metadata of its attempts on the job
server (texts; no secrets), so any client can look after any job.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mal.client import package
from mal.client.server import JobServer
from mal.errors import ClusterError, RunPausedError
from mal.run.pause import ATTEMPT_VARIABLE
from mal.run.summary import COMMIT_VARIABLE, commit
from mal.spec.derived import Action, results_dir
from mal.spec.load import spec_from_values, spec_to_values
from mal.spec.schema import Spec

KIND = "mal-experiment"
CONTROL_KIND = "mal-control"
PAUSED = "PAUSED"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED", PAUSED)
_ENTRY = "python -m mal.client.entry"
_CONTROL_SECONDS = 120.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Order:
    """What is submitted."""

    action: Action
    name: str
    spec: Spec
    """Without the encryption key: that is among the secrets."""
    environment: package.Environment
    parent: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One submission of a job."""

    number: int
    submission: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED or PAUSED."""
    details: Any


@dataclass(frozen=True)
class Job:
    """A job as the server knows it, its attempts in order."""

    id: str
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def metadata(self) -> dict[str, str]:
        return cast(dict[str, str], self.last.details.metadata)

    @property
    def action(self) -> Action:
        return cast(Action, self.metadata["action"])

    @property
    def spec(self) -> Spec:
        return spec_from_values(json.loads(self.metadata["spec"]))

    def brief(self) -> dict[str, Any]:
        """The job in a line of `mal list-jobs`."""
        return {
            "id": self.id,
            "name": self.metadata["name"],
            "action": self.action,
            "status": self.last.status,
            "created": _moment(self.attempts[0].details.start_time),
            "attempts": len(self.attempts),
            "results_dir": results_dir(self.spec, self.action),
        }

    def full(self) -> dict[str, Any]:
        """All that is known of it."""
        details = self.last.details
        return self.brief() | {
            "parent_job_id": self.metadata.get("parent") or None,
            "message": details.message,
            "exit_code": details.driver_exit_code,
            "begun": _moment(details.start_time),
            "ended": _moment(details.end_time),
            "attempts": [{"submission_id": a.submission, "status": a.status} for a in self.attempts],
            "secrets": json.loads(self.metadata["secrets"]),
            "specs": json.loads(self.metadata["spec"]),
        }


def _moment(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).isoformat(timespec="seconds")


def create(server: JobServer, order: Order) -> str:
    """Submit a new job; returns its id."""
    slug = re.sub(r"[^a-z0-9]+", "-", order.name.lower()).strip("-")[:40] or order.action
    job_id = f"{slug}-{secrets.token_hex(4)}"
    _submit(server, job_id, 1, order)
    return job_id


def _submit(server: JobServer, job_id: str, number: int, order: Order) -> None:
    """Submit attempt ``number`` of a job."""
    submission = job_id if number == 1 else f"{job_id}.{number}"
    public, secret = order.environment.public, order.environment.secret
    metadata = {
        "kind": KIND,
        "id": job_id,
        "attempt": str(number),
        "name": order.name,
        "action": order.action,
        "parent": order.parent or "",
        "spec": json.dumps(spec_to_values(order.spec)),
        "runtime_env": json.dumps(public),
        "secrets": json.dumps(sorted(secret)),
    }
    variables = {ATTEMPT_VARIABLE: submission}
    if version := commit():
        variables[COMMIT_VARIABLE] = version  # the copy of this package that is sent is in no checkout
    with tempfile.TemporaryDirectory(prefix="mal-job-") as folder:
        package.write_working_dir(Path(folder), order.spec, secret)
        server.submit(
            entrypoint=f"{_ENTRY} {order.action}",
            submission_id=submission,
            metadata=metadata,
            runtime_env=package.runtime_env(public, folder, variables),
        )


def jobs(server: JobServer) -> list[Job]:
    """All jobs that the server knows, newest first."""
    found: dict[str, list[Attempt]] = {}
    for details in server.submissions():
        metadata = details.metadata or {}
        if metadata.get("kind") == KIND:
            number = int(metadata["attempt"])
            attempt = Attempt(number, details.submission_id, _status(details), details)
            found.setdefault(metadata["id"], []).append(attempt)
    made = [Job(key, tuple(sorted(attempts, key=lambda a: a.number))) for key, attempts in found.items()]
    return sorted(made, key=lambda job: job.attempts[0].details.start_time or 0, reverse=True)


def _status(details: Any) -> str:
    """Ray's word for the state; a run that ended because it was paused is PAUSED."""
    status = str(getattr(details.status, "value", details.status))
    return PAUSED if status == "FAILED" and details.driver_exit_code == RunPausedError.exit_code else status


def find(server: JobServer, job_id: str) -> Job:
    """The job of this id. Raises ClusterError if the server knows none."""
    for job in jobs(server):
        if job.id == job_id:
            return job
    raise ClusterError(f"{job_id}: {server.address} knows no such job; mal list-jobs shows those it knows")


def cancel(server: JobServer, job_id: str) -> Job:
    """Stop a job at once. What it has saved stays, and `resume` goes on from there."""
    job = find(server, job_id)
    if job.last.status in ENDED:
        raise ClusterError(f"{job_id} has ended ({job.last.status}): there is nothing to cancel")
    server.stop(job.last.submission)
    return job


def pause(server: JobServer, job_id: str) -> Job:
    """Ask a job to stop once its work at hand is saved (shards, the epoch's checkpoint).

    The request is left in the results folder by a small job on the cluster, which reaches that folder as the job does.

    Raises:
        ClusterError: the job has ended, or the request could not be left.
    """
    job = find(server, job_id)
    if job.last.status in ENDED:
        raise ClusterError(f"{job_id} has ended ({job.last.status}): there is nothing to pause")
    attempt = job.last
    folder = results_dir(job.spec, job.action)
    control = f"{attempt.submission}.{package.PAUSE}-{secrets.token_hex(3)}"
    working_dir = attempt.details.runtime_env["working_dir"]  # the uploaded one, with the same secrets
    server.submit(
        entrypoint=f"{_ENTRY} {package.PAUSE} {shlex.quote(folder)} {shlex.quote(attempt.submission)}",
        submission_id=control,
        metadata={"kind": CONTROL_KIND, "id": job_id},
        runtime_env=package.runtime_env(json.loads(job.metadata["runtime_env"]), working_dir, {}),
    )
    _wait_for_control(server, control)
    return job


def _wait_for_control(server: JobServer, control: str) -> None:
    """Wait until a control job has done its work, and delete its record."""
    deadline = time.monotonic() + _CONTROL_SECONDS
    while (status := _status(server.details(control))) not in ENDED:
        if time.monotonic() > deadline:
            raise ClusterError(f"{control}: the request to pause was not carried out within {_CONTROL_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    if status != "SUCCEEDED":
        lines = server.logs(control).strip().splitlines() or [status]
        raise ClusterError(f"{control}: the request to pause could not be left: {lines[-1]}")
    server.delete(control)


def resume(server: JobServer, job_id: str, given: package.Environment, process: Mapping[str, str]) -> Job:
    """Submit a job again with the same spec and results folder: it goes on from what is saved there.

    Secrets are not kept on the server: they come from ``given`` or, by name, from ``process`` (the environment).

    Raises:
        ClusterError: the job has not ended, or has succeeded.
        SpecError: a secret is missing.
    """
    job = find(server, job_id)
    if job.last.status == "SUCCEEDED":
        raise ClusterError(f"{job_id} has succeeded: there is nothing to go on with")
    if job.last.status not in ENDED:
        raise ClusterError(f"{job_id} is {job.last.status}: pause or cancel it first, and wait until it has ended")
    names = [name for name in json.loads(job.metadata["secrets"]) if name not in given.secret]
    secret = {**given.secret, **package.secrets_from(process, names)}
    public = given.public or json.loads(job.metadata["runtime_env"])
    order = Order(
        action=job.action,
        name=job.metadata["name"],
        spec=job.spec,
        environment=package.Environment(public, secret),
        parent=job.metadata["parent"] or None,
    )
    _submit(server, job_id, job.last.number + 1, order)
    return find(server, job_id)


def delete(server: JobServer, job_id: str) -> Job:
    """Delete the server's records of a job that has ended. Its results folder stays."""
    job = find(server, job_id)
    if job.last.status not in ENDED:
        raise ClusterError(f"{job_id} is {job.last.status}: cancel it first, and wait until it has ended")
    for attempt in job.attempts:
        server.delete(attempt.submission)
    return job


def without_key(spec: Spec) -> Spec:
    """The spec without its encryption key."""
    return dataclasses.replace(spec, encryption_key=None)
