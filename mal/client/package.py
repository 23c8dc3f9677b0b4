"""What a job consists of on its way to the cluster: a working directory with this package, the spec and the secrets.

The cluster needs the dependencies, not this package: it runs the version that the client has. Ray's job server hands
out the environment variables of a runtime env to whoever asks, so those that look like secrets travel in a file of the
uploaded directory instead (`mal.run.secrets`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import mal
from mal import storage
from mal.errors import SpecError, StorageError
from mal.run import secrets
from mal.spec.load import spec_to_values
from mal.spec.schema import Spec

SPEC_FILE = "spec.json"
PAUSE = "pause"
"""What `mal.client.entry` is told, beside the actions, to ask a run to pause."""
HOOK = "mal.run.secrets.load"
_RESERVED = {
    "working_dir": "the client makes it; code of yours goes with py_modules",
    "worker_process_setup_hook": "the client sets it, to hand secrets to the workers",
}
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Environment:
    """A runtime env, split into what may be seen and what must not."""

    public: dict[str, Any]
    """Ray's runtime env without secrets; its ``env_vars`` are not secret."""
    secret: dict[str, str]


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name is taken for a secret."""
    return _SECRET.search(name) is not None


def read_runtime_env(path: str | None) -> Environment:
    """A runtime-env file (YAML or JSON), split.

    Raises:
        SpecError: it cannot be read, is no mapping, or sets what the client sets.
    """
    if path is None:
        return Environment({}, {})
    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except (StorageError, yaml.YAMLError) as error:
        raise SpecError(f"--runtime-env {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"--runtime-env {path}: it must be a mapping, such as 'env_vars:' and 'pip:'")
    problems = [f"--runtime-env {path}: {name}: {why}" for name, why in _RESERVED.items() if name in content]
    variables = content.get("env_vars") or {}
    if not isinstance(variables, dict) or not all(isinstance(v, (str, int, float)) for v in variables.values()):
        problems.append(f"--runtime-env {path}: env_vars must be a mapping of names to texts")
    if problems:
        raise SpecError(problems)
    texts = {str(name): str(value) for name, value in variables.items()}
    public = {**content, "env_vars": {name: value for name, value in texts.items() if not is_secret(name)}}
    return Environment(public, {name: value for name, value in texts.items() if is_secret(name)})


def secrets_from(process: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Variables of this process that are to be handed on.

    Raises:
        SpecError: naming those that are not set.
    """
    missing = [name for name in names if name not in process]
    if missing:
        raise SpecError(
            f"{', '.join(missing)}: not set in this environment; set it, or give it in the env_vars of --runtime-env"
        )
    return {name: process[name] for name in names}


def write_working_dir(folder: Path, spec: Spec, secret: Mapping[str, str]) -> None:
    """Write the job's working directory into the empty ``folder``."""
    source = Path(mal.__file__).parent
    shutil.copytree(source, folder / "mal", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / SPEC_FILE).write_text(json.dumps(spec_to_values(spec), indent=1))
    if secret:
        (folder / secrets.FILE).touch(mode=0o600)
        (folder / secrets.FILE).write_text(json.dumps(dict(secret)))


def runtime_env(public: Mapping[str, Any], working_dir: str, attempt_variables: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime env of a job."""
    variables = {**public.get("env_vars", {}), **attempt_variables}
    return {**public, "working_dir": working_dir, "worker_process_setup_hook": HOOK, "env_vars": variables}
