"""A real head node of the tests' own: own ports, own temporary folder, token authentication, stopped by its pid."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass(frozen=True)
class Head:
    """What a test needs to talk to the head."""

    address: str
    token_file: Path
    folder: Path
    """Ray's own: logs, sessions."""

    @property
    def token(self) -> str:
        return self.token_file.read_text()

    def get(self, path: str) -> str:
        """The answer of the job server to a plain GET, with the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()


def _free_ports(count: int) -> list[int]:
    """Ports outside the range that Ray's workers take."""
    found: list[int] = []
    for port in range(20100 + os.getpid() % 5000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def head_node(folder: Path, cpus: int = 4) -> Iterator[Head]:
    """A running head. ``folder`` must be short: Ray's sockets are in it."""
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={gcs}"),
        *(f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *(f"--metrics-export-port={metrics}", f"--num-cpus={cpus}", "--object-store-memory=200000000"),
        "--disable-usage-stats",
    ]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        head = Head(f"http://127.0.0.1:{dashboard}", token_file, folder)
        _wait_until_up(head, process)
        yield head
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            head.get("/api/jobs/")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no head node: {(head.folder / 'head.log').read_text()[-2000:]}")
        time.sleep(0.5)
