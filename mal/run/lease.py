"""One driver at a time in a results folder: two would mix their models, their index and their status.

The driver keeps ``driver.json`` in the folder as long as it lives, and renews it every `BEAT_SECONDS`. Another one that
comes is refused while that goes on. A driver that was killed leaves its file behind: on the same machine it is seen at
once that its process is gone, from another machine when the file was not renewed for `GONE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mal import storage
from mal.errors import MalError, RunMismatchError, StorageError

FILE = "driver.json"
BEAT_SECONDS = 20.0
GONE_SECONDS = 90.0
"""A file that does not change while it is watched for so long is of a driver that is gone. No clocks are compared."""
_SETTLE_SECONDS = 1.0
"""Of two that come at the same moment, the one whose file is there after so long stays: object stores know no exclusive
writing, and of a folder that was left both may have deleted the file."""


@contextlib.contextmanager
def held(folder: str) -> Iterator[None]:
    """Inside, this process is the only driver in ``folder``.

    Raises:
        RunMismatchError: another one is at work there.
    """
    path = storage.join(folder, FILE)
    own = {"token": secrets.token_hex(8), "node": _node(), "process": os.getpid(), "begun": _begun(os.getpid())}
    settle = storage.is_remote(path)
    while not _take(path, own, settle):
        _wait_until_gone(path, folder)
        settle = True
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, own, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(MalError):  # a storage that is out of reach: what goes wrong in the block is shown
            if _read(path).get("token") == own["token"]:
                storage.delete(path)


def _take(path: str, own: dict[str, Any], settle: bool) -> bool:
    """Write the file, if there is none; ``settle``: and see whether it stays."""
    local = storage.local_path(path)
    if local is None:
        if storage.exists(path):
            return False
        storage.write_bytes(path, _text(own, 0).encode())
    else:
        storage.make_folder(storage.parent(path))
        try:
            with local.open("x") as file:
                file.write(_text(own, 0))
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"{path}: cannot write it: {error.strerror}") from error
    if settle:
        time.sleep(_SETTLE_SECONDS)
    return not settle or bool(_read(path).get("token") == own["token"])


def _wait_until_gone(path: str, folder: str) -> None:
    """Return when the file is of a driver that is gone, and delete it. Raises RunMismatchError if that one lives."""
    before, begun, told = _read(path), time.monotonic(), False
    while before and _lives(before) is not False:
        waited = time.monotonic() - begun
        now = _read(path)
        if not now:
            return
        if now != before or _lives(before):
            raise RunMismatchError(
                f"another run is at work in {folder}, process {now.get('process')} on node {now.get('node')}: wait for "
                "it, pause or cancel it, or choose another results_dir"
            )
        if waited > GONE_SECONDS:
            break
        if waited > 2.0 and not told:
            told = True
            print(
                f"{folder} was left by process {before.get('process')} on node {before.get('node')}, or it is still at "
                f"work there: known in {GONE_SECONDS:.0f} seconds at most",
                flush=True,
            )
        time.sleep(min(1.0, GONE_SECONDS / 10))
    if _read(path) == before:
        storage.delete(path)


def _lives(found: dict[str, Any]) -> bool | None:
    """Whether the process is alive; None if this cannot be known from here."""
    if found.get("node") != _node() or not found.get("begun"):
        return None
    return _begun(found["process"]) == found["begun"]


def _node() -> str:
    """This machine, and which of its containers: process numbers mean something only there."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _begun(process: int) -> str:
    """When a process of this machine began, and which boot; empty if there is none, or where that is not known."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else f"{rest[18]} {boot}"  # Z, X: it has ended, and nobody has asked how


def _beat(path: str, own: dict[str, Any], ended: threading.Event) -> None:
    """Renew the file until ``ended``. A storage that is out of reach for a while does not stop the run by this."""
    number = 0
    while not ended.wait(BEAT_SECONDS):
        number += 1
        try:
            if _read(path).get("token", own["token"]) != own["token"]:
                print(f"{path}: another run took this folder over; end one of the two", file=sys.stderr, flush=True)
            else:
                storage.write_bytes(path, _text(own, number).encode())
        except MalError as error:
            print(f"{path} could not be renewed: {error}", file=sys.stderr, flush=True)


def _read(path: str) -> dict[str, Any]:
    """The file's content; empty if there is none. One that is half written is there, with nothing in it."""
    try:
        text = storage.read_bytes(path)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    return content if isinstance(content, dict) and content else {"token": text.decode(errors="replace")}


def _text(own: dict[str, Any], beat: int) -> str:
    return json.dumps({**own, "beat": beat}) + "\n"
