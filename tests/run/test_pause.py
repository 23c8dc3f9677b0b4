"""The pause file: who is meant by it, and what becomes of it."""

from __future__ import annotations

import json

import pytest

from mal.errors import RunPausedError
from mal.run import pause
from mal.run.status import task_status


def test_a_run_by_hand_forgets_every_pause_of_before(tmp_path, monkeypatch):
    monkeypatch.delenv(pause.ATTEMPT_VARIABLE, raising=False)
    for attempt in ("", "job-1"):
        pause.ask(str(tmp_path), attempt)
        pause.forget_earlier(str(tmp_path))
        assert not pause.asked(str(tmp_path))


def test_a_job_keeps_the_pause_that_is_meant_for_it_even_if_asked_before_it_began(tmp_path, monkeypatch):
    monkeypatch.setenv(pause.ATTEMPT_VARIABLE, "job.2")
    pause.ask(str(tmp_path), "job.2")
    pause.forget_earlier(str(tmp_path))
    assert pause.asked(str(tmp_path))
    pause.ask(str(tmp_path), "job")
    pause.forget_earlier(str(tmp_path))
    assert not pause.asked(str(tmp_path))


def test_a_paused_run_is_not_called_a_failure(tmp_path):
    with pytest.raises(RunPausedError), task_status(str(tmp_path), "labelling"):
        raise pause.paused("3 of 9 shards are done")
    last = json.loads((tmp_path / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "SKIPPED"
    assert "paused, 3 of 9 shards are done" in last["message"]
