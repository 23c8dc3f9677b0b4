"""Storage: the same promises for every kind of path."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from mal import storage
from mal.errors import StorageError


def test_join_and_its_inverses():
    assert storage.join("/a/", "b", "c.json") == "/a/b/c.json"
    assert storage.join("s3://bucket/x?scheme=http", "y") == "s3://bucket/x/y?scheme=http"
    assert storage.join("/", "x") == "/x"
    path = storage.join("s3://bucket/x", "y.json")
    assert storage.parent(path) == "s3://bucket/x"
    assert storage.name(path) == "y.json"
    assert storage.parent("x.json") == "."


def test_a_question_mark_in_a_name_begins_no_query():
    """An annotation file could send signed requests, and with them a token, to a server of its own choice."""
    evil = "a.jpg?endpoint_override=127.0.0.1:9&scheme=http"
    path = storage.join("s3://bucket/images", evil)
    assert storage.name(path) == evil
    assert storage.parent(path) in ("s3://bucket/images", "s3://bucket/images?")
    filesystem, inner = storage.resolve(path)
    assert inner == f"bucket/images/{evil}"
    assert filesystem is storage.resolve("s3://bucket/other")[0], "the environment's client, with no option of its own"
    with_options = storage.join("s3://bucket/x?region=eu-north-1", "photo?size=large.jpg")
    assert storage.resolve(with_options)[1] == "bucket/x/photo?size=large.jpg"
    assert storage.resolve(with_options)[0].region == "eu-north-1"
    assert storage.join("/a", "b?c") == "/a/b?c"


def test_written_bytes_come_back(tmp_path):
    path = str(tmp_path / "new folder" / "ünï %20.bin")
    storage.write_bytes(path, b"abc" * 1000)
    assert storage.read_bytes(path) == b"abc" * 1000
    assert storage.size(path) == 3000
    assert storage.list_files(str(tmp_path / "new folder")) == ["ünï %20.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = str(tmp_path / "x")
    storage.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="boom"), storage.open_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError("boom")
    assert storage.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_one_clear_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageError, match=r"/dev/full: cannot write it: No space left on device"):
        storage.append_line("/dev/full", "x")


def test_missing_files_and_unknown_schemes_are_named(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        storage.read_bytes(str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="ftp://"):
        storage.exists("ftp://host/x")
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_append_and_delete(tmp_path):
    path = str(tmp_path / "log")
    storage.append_line(path, "one")
    storage.append_line(path, "two\n")
    assert storage.read_bytes(path) == b"one\ntwo\n"
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path)


def test_a_response_that_breaks_off_is_asked_for_again(monkeypatch):
    calls: list[str] = []

    def breaks_twice(path: str) -> bytes:
        calls.append(path)
        if len(calls) < 3:
            raise StorageError(f"{path}: the response broke off")
        return b"whole"

    monkeypatch.setattr(storage, "_READ_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(storage, "_read_once", breaks_twice)
    assert storage.read_bytes("s3://bucket/key") == b"whole"
    assert len(calls) == 3


def test_whatever_is_read_in_pieces_is_asked_for_again_too(monkeypatch):
    monkeypatch.setattr(storage, "_READ_PAUSES", (0.0, 0.0))
    calls: list[str] = []

    def breaks(path: str) -> int:
        calls.append(path)
        if len(calls) < 3:
            raise OSError("curlCode: 56, Failure when receiving data from the peer")
        return 7

    assert storage.retried("s3://bucket/key", breaks) == 7
    calls.clear()
    with pytest.raises(StorageError, match="/local/file: cannot read it: curlCode"):
        storage.retried("/local/file", breaks)
    assert len(calls) == 1


class Bucket:
    """An object store that shows an object when its stream is closed, however that comes about."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.blocks: list[int] = []
        self.at_block = lambda: None

    @contextlib.contextmanager
    def open_output_stream(self, name):
        parts = []

        class Stream:
            def write(_, data):  # noqa: N805
                parts.append(bytes(data))
                self.blocks.append(len(data))
                self.at_block()

        try:
            yield Stream()
        finally:
            self.objects[name] = b"".join(parts)


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr(storage, "resolve", lambda path: (made, path))
    return made


def test_an_upload_that_a_signal_interrupts_is_whole_or_not_there(bucket, monkeypatch):
    """Ray ends its workers by a signal that raises SystemExit wherever the main thread is."""
    data, sent = bytes(20 * 2**20), threading.Event()

    def end(*_):
        raise SystemExit(1)

    def tell_to_end():
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    bucket.at_block = tell_to_end
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            storage.write_bytes("s3://bucket/labels.json", data)
    finally:
        signal.signal(signal.SIGTERM, before)
    for thread in threading.enumerate():
        if thread.name == "upload":
            thread.join()
    assert len(bucket.blocks) == 3
    assert bucket.objects == {"s3://bucket/labels.json": data}


def test_what_is_interrupted_before_the_upload_is_not_there(bucket):
    with pytest.raises(KeyboardInterrupt), storage.open_write("s3://bucket/x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert bucket.objects == {}


def test_an_upload_that_fails_says_so(bucket):
    def fail():
        raise OSError(28, "out of quota")

    bucket.at_block = fail
    with pytest.raises(StorageError, match="s3://bucket/x: cannot write it: out of quota"):
        storage.write_bytes("s3://bucket/x", b"1")
