"""The account of attempts at a shard: which image, if any, kills the process that labels it.

A process that is killed (out of memory, a decoder that crashes) leaves no exception, so the account is written before
the work. Only deaths of an actor count: when the whole run was stopped or killed, its last attempt proves nothing. From
the third attempt on a shard is labelled image by image, each announced first; an image that was
announced by `DEATHS_PER_IMAGE` attempts that never came back is rejected, and the rest of the shard is labelled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from mal import storage

CAREFUL_FROM = 3
"""Attempt from which on images are labelled one by one."""
DEATHS_PER_IMAGE = 2
"""Deaths while one image was being labelled after which that image is rejected. One alone may be a node's."""


@dataclass
class Attempts:
    """The state of one shard's attempts, kept in a small JSON file."""

    path: str
    run: str = ""
    """Which run of the command makes this attempt."""
    attempt: int = 0
    deaths: Counter[int] = field(default_factory=Counter)
    """Place of an image in the shard -> deaths while it was announced."""
    announced: int | None = None

    @classmethod
    def begin(cls, path: str, run: str = "") -> Attempts:
        """Read the account, book the death of this run's attempt before, if any, and begin another."""
        account = cls(path, run)
        saved = _saved(path)
        if saved:
            account.attempt = saved["attempt"]
            account.deaths = Counter({int(place): n for place, n in saved["deaths"].items()})
            if saved["run"] != run:  # it ended with its run, by whatever ended that
                account.attempt -= 1
            elif saved["announced"] is not None:
                account.deaths[saved["announced"]] += 1
        account.attempt += 1
        account._save()
        return account

    @property
    def careful(self) -> bool:
        return self.attempt >= CAREFUL_FROM

    @property
    def poisoned(self) -> list[int]:
        """Places of the images to be rejected."""
        return sorted(place for place, n in self.deaths.items() if n >= DEATHS_PER_IMAGE)

    def announce(self, place: int | None) -> None:
        """Say which image is labelled next; None: none."""
        self.announced = place
        self._save()

    def end(self) -> None:
        """The shard is done."""
        storage.delete(self.path)

    def _save(self) -> None:
        content = {
            "run": self.run,
            "attempt": self.attempt,
            "deaths": dict(self.deaths),
            "announced": self.announced,
        }
        storage.write_bytes(self.path, json.dumps(content).encode())


def _saved(path: str) -> dict[str, Any]:
    """What the account says; empty if there is none, or none that can be read: then counting begins anew."""
    if not storage.exists(path):
        return {}
    try:
        return cast(dict[str, Any], json.loads(storage.read_bytes(path)))
    except ValueError:
        return {}


def one_by_one(account: Attempts, count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(place)`` for every place of a shard, each announced before it is begun."""
    results = []
    for place in range(count):
        account.announce(place)
        results.append(work(place))
    account.announce(None)
    return results
