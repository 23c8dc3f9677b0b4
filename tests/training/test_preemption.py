"""What tells training to stop, and that it is heard."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from mal.run import pause
from mal.training import preemption
from mal.training.preemption import Agreement, Notice, Wish, hear_sigterm, sigterm_pauses


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(pause.ATTEMPT_VARIABLE, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    preemption._TOLD.clear()
    signal.signal(signal.SIGTERM, before)


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_wish_is_agreed_on_after_the_first_step_and_then_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    agreement, reached = Agreement(None, 0), []
    for _ in range(9):
        now[0] += 0.5
        reached.append(agreement.reach(lambda: Wish.SAVE))
    every = round(preemption.AGREE_SECONDS / 0.5)
    assert [step for step, wish in enumerate(reached) if wish is not None] == [0, every, 2 * every]


def test_a_worker_that_is_told_to_end_wishes_to_leave_and_a_pause_goes_before(tmp_path):
    notice = Notice(str(tmp_path), 0)
    assert notice.wish() == Wish.GO_ON
    hear_sigterm()
    with preemption.training():
        _sigterm()
        assert notice.wish() == Wish.LEAVE
    pause.ask(str(tmp_path))
    assert notice.wish() == Wish.PAUSE
    assert Notice(str(tmp_path), 1).wish() == Wish.LEAVE  # the first rank alone looks for the file


def test_sigterm_ends_a_worker_that_does_not_train_or_is_told_twice(tmp_path):
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    hear_sigterm()
    _sigterm()
    assert len(ended) == 1
    with preemption.training():
        _sigterm()
        assert len(ended) == 1
        _sigterm()
    assert len(ended) == 2


def test_a_drained_node_is_saved_for_once(tmp_path):
    drained = SimpleNamespace(preempted_node_to_ranks={"a": [1]})
    notice = Notice(str(tmp_path), 0, drains=lambda: drained)
    assert [notice.wish(), notice.wish()] == [Wish.SAVE, Wish.GO_ON]
    drained.preempted_node_to_ranks["b"] = [0]
    assert [notice.wish(), notice.wish()] == [Wish.SAVE, Wish.GO_ON]


def test_a_driver_that_is_told_to_end_asks_for_a_pause_and_a_second_time_interrupts(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_pauses(str(tmp_path)):
        _sigterm()
        assert pause.asked(str(tmp_path))
        _sigterm()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_job_is_cancelled_by_sigterm_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv(pause.ATTEMPT_VARIABLE, "job")
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_pauses(str(tmp_path)):
        assert signal.getsignal(signal.SIGTERM) == before
