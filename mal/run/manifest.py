"""``manifest.json``: what a results folder was begun with, so that another input or model is refused, not mixed in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mal import storage
from mal.errors import RunMismatchError

REMEDY = "choose another results_dir, or delete this one"


def claim(folder: str, values: Mapping[str, Any], remedy: str = REMEDY) -> bool:
    """Begin the folder with ``values``, or go on in it if it was begun with the same ones.

    Args:
        values: everything that changes the results, by name; JSON values.

    Returns:
        Whether the folder had been begun before.

    Raises:
        RunMismatchError: naming every value that differs.
    """
    if begun_with(folder, values, remedy):
        return True
    storage.write_bytes(_path(folder), json.dumps(values, indent=1).encode() + b"\n")
    return False


def begun_with(folder: str, values: Mapping[str, Any], remedy: str = REMEDY) -> bool:
    """Whether the folder was begun, and with ``values``; nothing is written. Arguments and errors as of `claim`."""
    if not storage.exists(_path(folder)):
        return False
    begun, wanted = json.loads(storage.read_bytes(_path(folder))), json.loads(json.dumps(values))
    differing = [
        f"  {name}: begun with {begun.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted({*begun, *wanted})
        if begun.get(name) != wanted.get(name)
    ]
    if differing:
        raise RunMismatchError(f"{folder} was begun with something else; {remedy}:\n" + "\n".join(differing))
    return True


def _path(folder: str) -> str:
    return storage.join(folder, "manifest.json")
