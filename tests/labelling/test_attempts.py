"""The account of attempts: which image is to blame, decided without Ray."""

from __future__ import annotations

import pytest

from mal import storage
from mal.labelling.attempts import CAREFUL_FROM, DEATHS_PER_IMAGE, Attempts, one_by_one


class Killed(BaseException):
    """Stands for a SIGKILL: nothing after it runs."""


def _label(path: str, poisoned_image: int, images: int = 5) -> tuple[int, list[int]]:
    """Attempts until the shard is done, and the images that were rejected."""
    for attempt in range(1, 50):
        account = Attempts.begin(path)
        assert account.attempt == attempt

        def work(place: int) -> int:
            if place == poisoned_image and place not in account.poisoned:  # noqa: B023
                raise Killed
            return place

        try:
            if account.careful:
                assert one_by_one(account, images, work) == list(range(images))
            else:
                for place in range(images):
                    work(place)
            rejected = account.poisoned
            account.end()
            return attempt, rejected
        except Killed:
            continue
    raise AssertionError("never done")


def test_a_shard_that_never_dies_takes_one_attempt(tmp_path):
    path = str(tmp_path / "attempts" / "part.json")
    assert _label(path, poisoned_image=-1) == (1, [])
    assert not storage.exists(path)


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_the_image_that_kills_is_found_and_only_it_is_rejected(tmp_path, bad):
    attempts, rejected = _label(str(tmp_path / "part.json"), poisoned_image=bad)
    assert rejected == [bad]
    assert attempts == CAREFUL_FROM + DEATHS_PER_IMAGE


def test_one_death_while_an_image_is_announced_does_not_blame_it(tmp_path):
    path = str(tmp_path / "part.json")
    for _ in range(CAREFUL_FROM):
        account = Attempts.begin(path)
    account.announce(3)  # and a node is lost
    account = Attempts.begin(path)
    assert account.deaths == {3: 1}
    assert account.poisoned == []


def test_attempts_that_ended_with_their_run_blame_nobody(tmp_path):
    path = str(tmp_path / "part.json")
    for run in ("a", "b", "c", "d"):  # the driver is killed again and again
        account = Attempts.begin(path, run)
        assert account.attempt == 1
        account.announce(3)
    account = Attempts.begin(path, "d")  # and now only an actor
    assert (account.attempt, account.deaths) == (2, {3: 1})


@pytest.mark.parametrize("content", [b"", b'{"run": "a", "att'])
def test_an_account_that_cannot_be_read_begins_anew(tmp_path, content):
    path = tmp_path / "part.json"
    path.write_bytes(content)
    assert Attempts.begin(str(path), "run").attempt == 1
