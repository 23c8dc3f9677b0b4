"""The connection to Ray: a cluster named by ``RAY_ADDRESS``, the cluster of a job, or one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mal.errors import ClusterError
from mal.run.autoscaler import Reach, reach
from mal.run.room import Need, Node, check_room
from mal.spec.schema import RaySpec

WORKER_ENVIRONMENT = {
    # Spinning OpenMP threads make two busy cores six times slower.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}
_MIN_CPUS = 4
_KIND = "accelerator_type:"
_OTHER_CLUSTER = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster has, and what its autoscaler can bring."""

    gpus: float
    cpus: float
    embedded: bool
    """Started by us on this machine."""
    nodes: tuple[Node, ...] = ()
    """Those that are there at this moment."""
    coming_cpus: float = 0.0
    coming_gpus: float = 0.0
    """What the autoscaler can bring besides; counted in `cpus` and `gpus`."""
    kinds: tuple[Node, ...] = ()
    """Of the nodes that it can bring; empty if not known."""
    hardware: tuple[dict[str, Any], ...] = ()
    """Of every node: ``cpus`` and ``gpus`` as Ray counts them, ``gpu`` (its kind, or None), ``memory_gb``."""

    def check_room(self, need: Need) -> None:
        """Print a line if ``need`` has to wait for nodes. Raises ClusterError if it can never be met."""
        line = check_room(
            need,
            self.nodes,
            coming_cpus=self.coming_cpus,
            coming_gpus=self.coming_gpus,
            kinds=self.kinds,
            alone=self.embedded,
        )
        if line:
            print(line, flush=True)

    @property
    def worker_cpus(self) -> int:
        """CPUs that networks may use: on one machine its real ones, however many were declared to Ray."""
        return max(1, (os.cpu_count() or 1) if self.embedded else int(self.cpus))


@contextlib.contextmanager
def connected(spec: RaySpec, namespace: str = "mal") -> Iterator[Cluster]:
    """Connect to Ray for the length of a block, and leave it as it was found.

    Raises:
        ClusterError: no Ray at the address that the environment names.
    """
    # Read by ray at import. Reports of Ray Train are rare here, so a short poll costs nothing and saves seconds.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    os.environ.setdefault("RAY_COLOR_PREFIX", "1" if sys.stderr.isatty() else "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray

    if ray.is_initialized():
        yield _describe(spec, embedded=not address)
        return
    # It names the job server that the verbs talk to; Ray's processes would ask that one about their own cluster.
    job_server = os.environ.pop(_OTHER_CLUSTER, None)
    # A job may have been given some of these: its own values stay, and Ray is told that this is no contradiction.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    variables = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    if address and "://" not in address and ":" in address:
        variables["RAY_ADDRESS"] = address  # Ray Train's own actors look for it where a machine has several Rays
    runtime_env = {"env_vars": variables}
    common: dict[str, Any] = {"namespace": namespace, "runtime_env": runtime_env, "logging_level": logging.WARNING}
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ClusterError(
                f"RAY_ADDRESS = {address}: no connection to Ray there ({reason}). Start it, correct RAY_ADDRESS, "
                "or unset it to run on this machine"
            ) from error
    else:
        cpus = spec.num_cpus or max(_MIN_CPUS, (os.cpu_count() or 1) + 2)
        store = int(spec.object_store_gb * 2**30)
        ray.init(num_cpus=cpus, object_store_memory=store, include_dashboard=True, **common)
    try:
        yield _describe(spec, embedded=not address)
    finally:
        ray.shutdown()
        if job_server is not None:
            os.environ[_OTHER_CLUSTER] = job_server


def _describe(spec: RaySpec, embedded: bool) -> Cluster:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(Node(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in alive)
    hardware = tuple(describe_node(found) for found in alive)
    here_cpus, here_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    most = Reach() if embedded else reach(spec)
    coming_cpus, coming_gpus = max(0.0, most.cpus - here_cpus), max(0.0, most.gpus - here_gpus)
    gpus, cpus = here_gpus + coming_gpus, here_cpus + coming_cpus
    return Cluster(gpus, cpus, embedded, nodes, coming_cpus, coming_gpus, most.kinds, hardware)


def describe_node(resources: Mapping[str, float]) -> dict[str, Any]:
    """What a node is, from the resources that Ray counts on it."""
    kinds = [name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)]
    return {
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "gpu": kinds[0] if kinds else None,
        "memory_gb": round(resources.get("memory", 0.0) / 2**30, 1),
    }
