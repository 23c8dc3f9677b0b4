"""A real head node of the tests' own: own ports, own temporary folder, token authentication, stopped by its pid."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 240


@dataclass(frozen=True)
class Head:
    """What a test needs to talk to the head."""

    address: str
    token_file: Path
    folder: Path
    """Ray's own: logs, sessions."""
    gcs: str
    """What a driver on this machine connects to."""

    @property
    def token(self) -> str:
        return self.token_file.read_text()

    def is_up(self) -> bool:
        """Whether the job server answers."""
        try:
            self.get("/api/jobs/")
        except OSError:
            return False
        return True

    def nodes(self) -> int:
        """How many there are."""
        summary = json.loads(self.get("/nodes?view=summary"))["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def get(self, path: str) -> str:
        """The answer of the job server to a plain GET, with the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()


def _free_ports(count: int) -> list[int]:
    """Ports outside the range that Ray's workers take."""
    found: list[int] = []
    # From a random one on: tests of several sessions may look at the same moment.
    for port in range(20100 + secrets.randbelow(11000), 32700):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def head_node(folder: Path, cpus: int = 4, node_types: dict[str, Any] | None = None) -> Iterator[Head]:
    """A running head. ``folder`` must be short: Ray's sockets are in it.

    ``node_types``: what its autoscaler can bring, as further raylets on this machine with made-up resources.
    """
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    gcs, dashboard, client, *agents = _free_ports(7)
    environment = _environment(token_file)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={gcs}"),
        *(f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *_agent_ports(agents),
        *(f"--ray-client-server-port={client}", f"--num-cpus={cpus}", "--object-store-memory=200000000"),
        "--disable-usage-stats",
    ]
    if node_types is not None:
        config = folder / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(f"127.0.0.1:{gcs}", node_types)))
        command += [f"--autoscaling-config={config}", "--node-ip-address=127.0.0.1"]
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    head = Head(f"http://127.0.0.1:{dashboard}", token_file, folder, f"127.0.0.1:{gcs}")
    with _running(command, environment, folder / "head.log", head.is_up):
        yield head


def _agent_ports(ports: list[int]) -> list[str]:
    """With given ports a node need not wait for its agents to choose some, which on a busy machine takes too long."""
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]


def _environment(token_file: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return clean | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path, is_up: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """``ray start --block`` in a process group of its own, up; stopped in the end.

    On a busy machine Ray gives a start up after fifteen seconds: it is tried again.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        process = _start(command, environment, log)
        while process.poll() is None and time.monotonic() < deadline and not is_up():
            time.sleep(0.5)
        if process.poll() is None and is_up():
            break
        _stop(process)
        if time.monotonic() > deadline:
            raise RuntimeError(f"no node: {log.read_text()[-2000:]}")
    try:
        yield process
    finally:
        _stop(process)


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@contextlib.contextmanager
def worker_node(head: Head, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """One node more, on this machine. Kill it by `kill_node`."""
    before = head.nodes()
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={head.gcs}"),
        *(*_agent_ports(_free_ports(4)), f"--num-cpus={cpus}", "--object-store-memory=200000000"),
    ]
    log = head.folder / f"node{before}.log"
    with _running(command, _environment(head.token_file), log, lambda: head.nodes() > before) as process:
        yield process


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """As a spot machine goes: all of the node at once, without a word."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _autoscaling(gcs: str, node_types: dict[str, Any]) -> dict[str, Any]:
    """A configuration of Ray's autoscaler with the provider that fakes nodes."""
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands")
    commands = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.15,
        "docker": {},
        "auth": {"ssh_user": "nobody"},
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, **node_types},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "rsync_filter": [],
        **{name: [] for name in (*lists, *commands)},
    }
