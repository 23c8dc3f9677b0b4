"""Reading and writing of files on a local disk, S3 or Google Cloud Storage, all through ``pyarrow.fs``.

A path is a local path (``/data/x``, ``x``, ``~/x``) or a URI (``s3://bucket/key``, ``gs://bucket/key``). Credentials
and endpoints come from the environment (``AWS_*``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``), never
from a path. Nothing is written in place: a reader sees the whole new file or the old one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.fs as pafs

from mal.errors import StorageError

T = TypeVar("T")

_REMOTE_ATTEMPTS = 8
_READ_PAUSES = (0.2, 0.8, 3.2)
"""Seconds before the next try, beside the client's own tries: those do not cover a response that breaks off."""
_SPOOL_BYTES = 64 * 2**20
_PART = ".part"
"""Ending of temporary names; `list_files` does not show them."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URI of an object store."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path | None:
    """The path on this machine's disk; None if it is remote."""
    if is_remote(path):
        return None
    return Path(path.removeprefix("file://")).expanduser()


def absolute(path: str) -> str:
    """The same file, named independently of the working directory (workers and jobs have another one)."""
    local = local_path(path)
    return path if local is None else os.path.abspath(local)


def _split(path: str) -> tuple[str, str]:
    """A path, and the query of a URI from its last question mark on; an empty text if there is none."""
    if not is_remote(path):
        return path, ""
    head, question, query = path.rpartition("?")
    return (head, question + query) if question else (path, "")


def join(base: str, *parts: str) -> str:
    """``base/part/...``; the query of a URI stays at its end.

    Parts are names as they are: where one holds a question mark, the end gets another, so that it is no query.
    """
    base, query = _split(base)
    joined = "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])
    return joined + (query or ("?" if is_remote(joined) and "?" in joined else ""))


def parent(path: str) -> str:
    """The folder that holds ``path``."""
    head, query = _split(path)
    folder = head.rstrip("/").rpartition("/")[0]
    return (folder or ("/" if head.startswith("/") else ".")) + query


def name(path: str) -> str:
    """The last part of ``path``."""
    return _split(path)[0].rstrip("/").rpartition("/")[2]


@functools.lru_cache(maxsize=64)
def _remote_filesystem(scheme: str, authority: str, query: str) -> pafs.FileSystem:
    """One client per bucket and process: it holds the connections. ``query``: pyarrow's options, if any."""
    if scheme == "s3" and not query:
        # Unlike a URI, this constructor does not read the endpoint from the environment.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        kind, _, host = endpoint.rpartition("://")
        return pafs.S3FileSystem(
            endpoint_override=host.rstrip("/") or None,
            scheme=kind or "https",
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_REMOTE_ATTEMPTS),
        )
    uri = f"{scheme}://{authority}/x" + (f"?{query}" if query else "")
    return pafs.FileSystem.from_uri(uri)[0]


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it.

    Raises:
        StorageError: the scheme is unknown or its client cannot be made.
    """
    local = local_path(path)
    if local is not None:
        return pafs.LocalFileSystem(), os.path.abspath(local)
    head, query = _split(path)
    scheme, _, rest = head.partition("://")
    if scheme not in ("s3", "gs"):
        raise StorageError(f"{path}: unknown kind of storage '{scheme}://'; use a local path, s3:// or gs://")
    with _explained(path, "reach"):
        return _remote_filesystem(scheme, rest.partition("/")[0], query.removeprefix("?")), rest.rstrip("/")


@contextlib.contextmanager
def _explained(path: str, verb: str) -> Iterator[None]:
    """Turn errors of the operating system and of pyarrow into a StorageError that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: cannot {verb} it, there is no such file or folder") from error
    except (OSError, pa.ArrowException) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
        raise StorageError(f"{path}: cannot {verb} it: {reason}") from error


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    filesystem, inner = resolve(path)
    with _explained(path, "look up"):
        return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def size(path: str) -> int:
    """Bytes of a file. Raises StorageError if there is none."""
    filesystem, inner = resolve(path)
    with _explained(path, "read"):
        info = filesystem.get_file_info(inner)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(path)
        return int(info.size)


def open_read(path: str) -> pa.NativeFile:
    """Open for reading at any place. Raises StorageError if it cannot be read."""
    filesystem, inner = resolve(path)
    with _explained(path, "read"):
        return filesystem.open_input_file(inner)


def read_bytes(path: str) -> bytes:
    """The whole content. A connection to an object store that breaks while it is read is tried again, with backoff."""
    return retried(path, _read_once)


def retried(path: str, read: Callable[[str], T]) -> T:
    """``read(path)``; if ``path`` is in an object store, again after some time when the store or the line fails.

    The client retries requests by itself, but not a response that breaks off.

    Raises:
        StorageError: it failed every time, or there is no such file.
    """
    for pause in _READ_PAUSES if is_remote(path) else ():
        try:
            with _explained(path, "read"):
                return read(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(pause * random.uniform(0.5, 1.5))  # so that many actors do not come back at the same moment
    with _explained(path, "read"):
        return read(path)


def _read_once(path: str) -> bytes:
    with open_read(path) as file, _explained(path, "read"):
        return file.read()


@contextlib.contextmanager
def open_write(path: str) -> Iterator[BinaryIO]:
    """Open for writing; the file appears under its name when the block ends well, and not at all otherwise.

    Local: a temporary file beside it, flushed to disk, then renamed. Remote: spooled here (in memory up to 64 MiB,
    then on disk), then uploaded; an object store shows an object only when its upload is complete.
    """
    filesystem, inner = resolve(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        spool = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES))  # noqa: SIM115 - see _upload
        try:
            yield spool
            spool.seek(0)
        except BaseException:
            spool.close()
            raise
        with _explained(path, "write"):
            _upload(filesystem, inner, spool)
        return
    target = Path(inner)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_PART}")
    try:
        with _explained(path, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _upload(filesystem: pafs.FileSystem, inner: str, spool: BinaryIO) -> None:
    """Upload all of ``spool``, then close it: in a thread, where a signal's exception cannot break in.

    A stream that an exception leaves is closed, and to close is to complete: half an object would stand there as if it
    were whole. If the wait is interrupted, the upload goes on to its end, or ends with the process and leaves nothing.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            with spool, filesystem.open_output_stream(inner) as out:
                shutil.copyfileobj(spool, out, 8 * 2**20)
        except BaseException as error:  # noqa: BLE001 - the thread's outermost frame: it is raised below
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="upload").start()
    done.result()


def write_bytes(path: str, data: bytes) -> None:
    """Write ``data`` as the file's whole content, atomically."""
    with open_write(path) as file:
        file.write(data)


def append_line(path: str, line: str) -> None:
    """Add one line to a log. Object stores cannot append: there the file is written anew (keep such logs short)."""
    data = line.rstrip("\n").encode() + b"\n"
    local = local_path(path)
    if local is None:
        write_bytes(path, (read_bytes(path) if exists(path) else b"") + data)
        return
    with _explained(path, "write"):
        local.parent.mkdir(parents=True, exist_ok=True)
        with open(local, "ab") as file:
            file.write(data)


def delete(path: str) -> None:
    """Delete a file or a folder with all it holds; no error if there is none."""
    filesystem, inner = resolve(path)
    with _explained(path, "delete"), contextlib.suppress(FileNotFoundError):  # someone else may be faster
        kind = filesystem.get_file_info(inner).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(inner)
        elif kind != pafs.FileType.NotFound:
            filesystem.delete_file(inner)


def list_files(folder: str) -> list[str]:
    """Names of the files right in ``folder``, sorted; empty if there is no such folder. Temporary ones are left out."""
    filesystem, inner = resolve(folder)
    with _explained(folder, "list"):
        infos = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and not i.base_name.endswith(_PART))


def list_folders(folder: str) -> list[str]:
    """Names of the folders right in ``folder``, sorted; empty if there is no such folder."""
    filesystem, inner = resolve(folder)
    with _explained(folder, "list"):
        infos = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)


def copy(source: str, target: str) -> None:
    """Copy a file, some megabytes at a time; it appears under its new name when it is complete."""
    with open_read(source) as read, open_write(target) as written, _explained(source, "copy"):
        shutil.copyfileobj(read, written, 8 * 2**20)


def delete_leftovers(folder: str) -> None:
    """Delete what killed writers left right in ``folder``. Only when nobody writes there any more."""
    local = local_path(folder)
    if local is not None and local.is_dir():
        for file in local.glob(f".*{_PART}"):
            file.unlink(missing_ok=True)


def make_folder(path: str) -> None:
    """Make a folder and those above it; no error if it is there. Object stores need none."""
    local = local_path(path)
    if local is not None:
        with _explained(path, "make"):
            local.mkdir(parents=True, exist_ok=True)
