"""One driver at a time in a results folder; one that was killed does not keep the next one out."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mal import storage
from mal.errors import RunMismatchError
from mal.run import lease, pause
from mal.run.status import task_status

HOLDER = """
import sys, time
from mal.run.lease import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "GONE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)


@pytest.fixture
def driver(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_held_and_left(tmp_path):
    with lease.held(str(tmp_path)):
        assert (tmp_path / lease.FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), lease.held(str(tmp_path)):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("here", [True, False])
def test_a_second_driver_is_refused_and_leaves_no_trace(tmp_path, driver, monkeypatch, here):
    """At once on the same machine; on another one, when the file is seen to be renewed."""
    monkeypatch.setattr(lease, "GONE_SECONDS", 60)
    if not here:
        beat = json.loads((tmp_path / lease.FILE).read_text())
        monkeypatch.setattr(lease, "_node", lambda: "elsewhere")
        threading.Timer(1.0, lambda: (tmp_path / lease.FILE).write_text(json.dumps({**beat, "beat": 1}))).start()
    pause.ask(str(tmp_path))
    refused = pytest.raises(RunMismatchError, match=f"process {driver.pid} on node")
    with refused, task_status(str(tmp_path), "inference"):
        raise AssertionError("never inside")
    assert pause.asked(str(tmp_path)), "the request was for the other one"
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_of_a_killed_driver_on_this_machine_nothing_is_waited_for(tmp_path, driver, monkeypatch, reaped):
    monkeypatch.setattr(lease, "GONE_SECONDS", 60)
    os.kill(driver.pid, signal.SIGKILL)
    if reaped:
        driver.wait()
    else:
        while lease._begun(driver.pid):
            time.sleep(0.01)
    begun = time.monotonic()
    with lease.held(str(tmp_path)):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()
    assert time.monotonic() - begun < 5


def test_another_process_with_the_number_of_the_killed_one_does_not_count(tmp_path):
    left = {"token": "t", "node": lease._node(), "process": os.getpid(), "begun": "1 another-boot"}
    (tmp_path / lease.FILE).write_text(json.dumps(left))
    with lease.held(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    "content", ['{"token": "t", "node": "elsewhere", "process": 1, "begun": "1 x", "beat": 4}', "", "{"]
)
def test_what_another_machine_left_is_watched_and_then_taken_over(tmp_path, capsys, content):
    """A half written file, too."""
    (tmp_path / lease.FILE).write_text(content)
    begun = time.monotonic()
    with lease.held(str(tmp_path)):
        assert time.monotonic() - begun > 1.4
        time.sleep(0.4)
        assert json.loads((tmp_path / lease.FILE).read_text())["beat"] >= 2, "it is renewed"


def test_of_two_that_come_at_the_same_moment_one_stays(tmp_path):
    """Also where a killed driver's file is in the way of both."""
    (tmp_path / lease.FILE).write_text(json.dumps({"token": "t", "node": lease._node(), "process": 1, "begun": "1 x"}))
    inside, most, refused = [], [], []

    def drive() -> None:
        try:
            with lease.held(str(tmp_path)):
                inside.append(1)
                most.append(len(inside))
                time.sleep(3)
                inside.pop()
        except RunMismatchError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(refused) == 5


def test_on_an_object_store_the_one_whose_file_stays_goes_on(monkeypatch):
    """It has no exclusive writing: whoever writes last is there."""
    files: dict[str, bytes] = {}
    beats = itertools.count()

    def write(path: str, data: bytes) -> None:
        """Another driver writes right after this one."""
        files[path] = b"another's"

    def read(path: str) -> bytes:
        other = {"token": "other", "node": "elsewhere", "process": 7, "begun": "1 x", "beat": next(beats)}
        return json.dumps(other).encode()

    monkeypatch.setattr(storage, "write_bytes", write)
    monkeypatch.setattr(storage, "read_bytes", read)
    monkeypatch.setattr(storage, "exists", lambda path: path in files)
    with pytest.raises(RunMismatchError, match="process 7 on node elsewhere"), lease.held("s3://bucket/run"):
        raise AssertionError("never inside")


def test_a_storage_that_cannot_be_renewed_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def fail(path: str, data: bytes) -> None:
        raise storage.StorageError(f"{path}: the disk is gone")

    with lease.held(str(tmp_path)):
        monkeypatch.setattr(storage, "write_bytes", fail)
        time.sleep(0.5)
    assert "could not be renewed" in capsys.readouterr().err
    assert not Path(tmp_path, lease.FILE).exists()
