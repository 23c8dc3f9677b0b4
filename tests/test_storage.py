"""Storage: the same promises for every kind of path."""

from __future__ import annotations

import os

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
