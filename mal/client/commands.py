"""The job verbs of ``mal``: JSON on stdout, messages on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from mal.client import compose, jobs, package, schema
from mal.client.server import JobServer
from mal.encryption import ENVIRONMENT as ENCRYPTION_KEY
from mal.errors import ClusterError, MalError, SpecError
from mal.spec.derived import ACTIONS

_IGNORED = {
    "--workspace-id": "there are no workspaces here: results_dir and the dataset paths stand in the spec",
    "--train-datasets": "data sets have no ids here: dataset.train_ann_path and train_img_dir stand in the spec",
    "--eval-dataset": "data sets have no ids here: dataset.val_ann_path and val_img_dir stand in the spec",
    "--inference-dataset": "data sets have no ids here: inference.ann_path and img_dir stand in the spec",
}
"""Flags of the productised peer that are accepted, because the spec must say the same in paths."""

_EPILOG = """\
Prints JSON on stdout (pipe it to jq) and messages on stderr; exit code 0 done, 1 failed, 2 a wrong spec or command.
The cluster is --address, else RAY_ADDRESS, else http://127.0.0.1:8265. A cluster with token authentication needs
RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or ~/.ray/auth_token).
"""


def add_job_commands(commands: Any) -> None:
    """Add the verbs to the subparsers of `mal`."""
    _add_offline(commands)
    create = _verb(commands, "create-job", "submit a task to a cluster", _create)
    create.add_argument("--kind", choices=["experiment"], default="experiment", help="only experiments exist")
    create.add_argument("--action", choices=ACTIONS, required=True, help="the task")
    create.add_argument("--name", required=True, help="a name for people")
    create.add_argument("--specs", metavar="JSON", help="the spec as JSON, such as the `default` of get-job-schema")
    create.add_argument("-e", "--experiment_spec", metavar="FILE", help="the spec as a YAML file")
    create.add_argument("--parent-job-id", metavar="ID", help="take data, network and checkpoint from this job")
    _base_experiment(create)
    _environment(create)
    key = "the key of encrypted checkpoints; better as the environment variable " + ENCRYPTION_KEY
    create.add_argument("--encryption-key", metavar="KEY", help=key)
    for flag, why in _IGNORED.items():
        create.add_argument(flag, metavar="ID", help=f"accepted and ignored: {why}")
    create.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the spec's")
    _on_job(commands, "get-job-metadata", "all that is known of a job", _metadata)
    logs = _on_job(commands, "get-job-logs", "what a job's latest attempt wrote", _logs)
    logs.add_argument("--follow", action="store_true", help="one JSON object per line of the log, until the job ends")
    _verb(commands, "list-jobs", "the jobs that the cluster knows, newest first", _list)
    _on_job(commands, "cancel-job", "stop a job at once; what it saved stays", _cancel)
    _on_job(commands, "pause-job", "stop a job once its work at hand is saved", _pause)
    _environment(_on_job(commands, "resume-job", "go on with a job that was paused, cancelled or failed", _resume))
    _on_job(commands, "delete-job", "forget a job that has ended; its results stay", _delete)


def _add_offline(commands: Any) -> None:
    """The verbs that need no cluster."""
    text = "architectures and checkpoints that a training can start from"
    base = _verb(commands, "list-base-experiments", text, _base_experiments, cluster=False)
    base.add_argument("--checkpoints", metavar="FOLDER", help="also list the checkpoints in this folder")
    shape = _verb(commands, "get-job-schema", "JSON Schema of a task's spec, with defaults", _schema, cluster=False)
    shape.add_argument("--action", choices=ACTIONS, required=True, help="the task")
    _base_experiment(shape)


def _verb(commands: Any, name: str, text: str, run: Any, *, cluster: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if cluster:
        parser.add_argument("--address", metavar="URL", help="the cluster's job server")
    parser.set_defaults(run=run)
    return parser


def _on_job(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = _verb(commands, name, text, run)
    parser.add_argument("--kind", choices=["experiment"], default="experiment", help="only experiments exist")
    parser.add_argument("--job-id", "--id", metavar="ID", required=True, help="what create-job printed as `id`")
    return parser


def _base_experiment(parser: argparse.ArgumentParser) -> None:
    text = "what to start from: an `id` of list-base-experiments, or a JSON list of one"
    parser.add_argument("--base-experiment-id", "--base-experiment-ids", metavar="ID", help=text)


def _environment(parser: argparse.ArgumentParser) -> None:
    text = "Ray's runtime env (YAML): pip, env_vars ...; variables named like secrets are kept from the job server"
    parser.add_argument("--runtime-env", metavar="FILE", help=text)
    text = "hand on this variable of the present environment as a secret (may be repeated)"
    parser.add_argument("--secret-env", metavar="NAME", action="append", default=[], help=text)


def _print(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _base_id(options: argparse.Namespace) -> str | None:
    given: str | None = options.base_experiment_id
    if not given or not given.lstrip().startswith("["):
        return given
    try:
        ids = json.loads(given)
    except json.JSONDecodeError as error:
        raise SpecError(f"--base-experiment-ids {given}: not valid JSON") from error
    if len(ids) != 1 or not isinstance(ids[0], str):
        raise SpecError(f"--base-experiment-ids {given}: give exactly one id")
    return str(ids[0])


def _base_experiments(options: argparse.Namespace) -> None:
    _print(schema.base_experiments(options.checkpoints))


def _schema(options: argparse.Namespace) -> None:
    _print(schema.job_schema(options.action, _base_id(options)))


def _create(options: argparse.Namespace) -> None:
    for flag, why in _IGNORED.items():
        if getattr(options, flag.removeprefix("--").replace("-", "_")):
            _say(f"{flag} is ignored: {why}")
    environment = _given_environment(options)
    server = JobServer(options.address) if options.parent_job_id else None
    parent = _parent(server, options.parent_job_id) if server else None
    sources = compose.Sources(
        base_experiment=_base_id(options),
        parent=(parent.action, parent.spec) if parent else None,
        file=options.experiment_spec,
        specs=options.specs,
        overrides=options.overrides,
        encryption_key=options.encryption_key or os.environ.get(ENCRYPTION_KEY),
    )
    spec = compose.compose(options.action, sources)
    secret = dict(environment.secret)
    if spec.encryption_key:
        secret[ENCRYPTION_KEY] = spec.encryption_key
    order = jobs.Order(
        action=options.action,
        name=options.name,
        spec=jobs.without_key(spec),
        environment=package.Environment(environment.public, secret),
        parent=options.parent_job_id,
    )
    server = server or JobServer(options.address)
    job_id = jobs.create(server, order)
    _say(f"submitted to {server.address}; watch it: mal get-job-logs --follow --job-id {job_id}")
    _print({"id": job_id, "name": options.name, "action": options.action})


def _parent(server: JobServer, job_id: str) -> jobs.Job:
    parent = jobs.find(server, job_id)
    if parent.last.status not in ("SUCCEEDED", jobs.PAUSED):
        raise ClusterError(
            f"--parent-job-id {job_id}: it is {parent.last.status}, so its checkpoint may not be there; "
            "wait until it has succeeded"
        )
    return parent


def _given_environment(options: argparse.Namespace) -> package.Environment:
    environment = package.read_runtime_env(options.runtime_env)
    named = package.secrets_from(os.environ, options.secret_env)
    return package.Environment(environment.public, {**environment.secret, **named})


def _metadata(options: argparse.Namespace) -> None:
    _print(jobs.find(JobServer(options.address), options.job_id).full())


def _list(options: argparse.Namespace) -> None:
    _print([job.brief() for job in jobs.jobs(JobServer(options.address))])


def _logs(options: argparse.Namespace) -> None:
    server = JobServer(options.address)
    job = jobs.find(server, options.job_id)
    if not options.follow:
        _print({"id": job.id, "status": job.last.status, "logs": server.logs(job.last.submission)})
        return
    for line in server.follow(job.last.submission):
        print(json.dumps({"log": line}, ensure_ascii=False), flush=True)
    job = jobs.find(server, options.job_id)
    print(json.dumps({"status": job.last.status}), flush=True)
    if job.last.status == "FAILED":
        raise MalError(f"{job.id} failed")


def _cancel(options: argparse.Namespace) -> None:
    job = jobs.cancel(JobServer(options.address), options.job_id)
    _print({"id": job.id, "status": "STOPPING"})


def _pause(options: argparse.Namespace) -> None:
    job = jobs.pause(JobServer(options.address), options.job_id)
    _say("it stops when its work at hand is saved; get-job-metadata then says PAUSED")
    _print({"id": job.id, "status": "PAUSING"})


def _resume(options: argparse.Namespace) -> None:
    job = jobs.resume(JobServer(options.address), options.job_id, _given_environment(options), os.environ)
    _print({"id": job.id, "status": job.last.status, "attempt": job.last.number})


def _delete(options: argparse.Namespace) -> None:
    job = jobs.delete(JobServer(options.address), options.job_id)
    _print({"id": job.id, "deleted": True, "results_dir": job.brief()["results_dir"]})
