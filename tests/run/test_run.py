"""Status lines, manifest and progress of a run."""

from __future__ import annotations

import inspect
import io
import json
import time

import pytest

from mal.errors import MalError, RunMismatchError
from mal.run.manifest import claim
from mal.run.progress import LOG_SECONDS, ProgressLine, Rate, duration
from mal.run.status import task_status


def _lines(folder):
    return [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]


def test_status_tells_start_and_success(tmp_path):
    with task_status(str(tmp_path), "training") as status:
        status.write("RUNNING", "epoch 1", {"train_loss": 0.5, "mIoU": float("nan")})
        status.write("SUCCESS", "done")
    first, second, third = _lines(tmp_path)
    assert (first["status"], second["status"], third["status"]) == ("STARTED", "RUNNING", "SUCCESS")
    assert second["kpi"] == {"train_loss": 0.5}
    assert set(first) == {"date", "time", "status", "verbosity", "message"}


@pytest.mark.parametrize("error", [MalError("disk gone"), ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_is_written_whatever_the_cause(tmp_path, error):
    with pytest.raises(type(error)), task_status(str(tmp_path), "training"):
        raise error
    assert _lines(tmp_path)[-1]["status"] == "FAILURE"
    assert _lines(tmp_path)[-1]["verbosity"] == "ERROR"


def test_a_folder_refuses_what_it_was_not_begun_with(tmp_path):
    folder = str(tmp_path)
    assert claim(folder, {"model": "a", "crop": 512, "thresholds": (0.1,)}) is False
    assert claim(folder, {"model": "a", "crop": 512, "thresholds": (0.1,)}) is True
    with pytest.raises(RunMismatchError, match=r"model: begun with 'a', now 'b'") as caught:
        claim(folder, {"model": "b", "crop": 512, "thresholds": (0.1,)})
    assert "crop" not in str(caught.value)


def _wait_for(what) -> None:
    deadline = time.monotonic() + 30
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert what()


def test_a_log_gets_a_line_now_and_then_even_if_nothing_moves_and_one_at_the_end():
    stream, told = io.StringIO(), []
    with ProgressLine("labelling", 100, "boxes", already=10, stream=stream, every=0.01, on_line=told.append) as line:
        line.advance(30)
        _wait_for(lambda: len(told) >= 3)
        line.advance(60, "2 actors")
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(told)
    assert lines[2].startswith("labelling: 40/100 boxes, ")
    assert " left" in lines[2]
    assert lines[-1].startswith("labelling: 100/100 boxes, ")
    assert lines[-1].endswith("/s), 2 actors")
    assert " left" not in lines[-1]


def test_by_default_a_line_comes_every_thirty_seconds():
    assert inspect.signature(ProgressLine).parameters["every"].default == LOG_SECONDS == 30.0


def test_what_a_line_says_is_asked_for_when_it_is_written():
    stream = io.StringIO()
    with ProgressLine("x", 1, "boxes", stream=stream, describe=lambda: "3 actors, 4 rejected"):
        pass
    assert stream.getvalue().endswith(", 3 actors, 4 rejected\n")


def test_a_status_that_cannot_be_written_stops_the_work():
    def full(_: str) -> None:
        raise OSError("the disk is full")

    def work() -> None:
        with ProgressLine("x", 9, "boxes", stream=io.StringIO(), every=0.01, on_line=full) as line:
            _wait_for(lambda: line.failed is not None)
            line.advance(1)
            raise AssertionError("went on")

    with pytest.raises(OSError, match="the disk is full"):
        work()


def test_a_bar_is_drawn_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressLine("labelling", 10, "boxes", stream=stream) as line:
        line.advance(10)
    assert "10/10 boxes" in stream.getvalue()


def test_rates():
    now = [0.0]
    rate = Rate(lambda: now[0])
    for _ in range(200):
        now[0] += 1.0
        rate.add(2.0)
    now[0] += 100.0
    rate.add(0.0)
    assert rate.mean == pytest.approx(400 / 300)
    assert rate.now < 2.0
    assert [duration(s) for s in (5, 75, 3700)] == ["5s", "1m15s", "1h01m"]
