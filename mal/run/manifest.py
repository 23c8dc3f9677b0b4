"""``manifest.json``: what a results folder was begun with, so that another input or model is refused, not mixed in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mal import storage
from mal.errors import RunMismatchError


def claim(
    folder: str, values: Mapping[str, Any], remedy: str = "choose another results_dir, or delete this one"
) -> bool:
    """Begin the folder with ``values``, or go on in it if it was begun with the same ones.

    Args:
        values: everything that changes the results, by name; JSON values.

    Returns:
        Whether the folder had been begun before.

    Raises:
        RunMismatchError: naming every value that differs.
    """
    path = storage.join(folder, "manifest.json")
    wanted = json.loads(json.dumps(values))
    if not storage.exists(path):
        storage.write_bytes(path, json.dumps(wanted, indent=1).encode() + b"\n")
        return False
    begun = json.loads(storage.read_bytes(path))
    differing = [
        f"  {name}: begun with {begun.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted({*begun, *wanted})
        if begun.get(name) != wanted.get(name)
    ]
    if differing:
        raise RunMismatchError(f"{folder} was begun with something else; {remedy}:\n" + "\n".join(differing))
    return True
