"""The board on which training workers write how they are doing, and from which the driver shows it."""

from __future__ import annotations

from typing import Any

NAME = "mal-training-board"


class Board:
    """A Ray actor: keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._notes: list[dict[str, Any]] = []

    def write(self, note: dict[str, Any]) -> None:
        """``{"kind": "steps", "boxes", "loss", "waiting", "first_step", "losses", "rate"}`` or
        ``{"kind": "epoch", "message", "kpi", "step"}``."""
        self._notes.append(note)

    def take(self) -> list[dict[str, Any]]:
        """All notes since the last call."""
        notes, self._notes = self._notes, []
        return notes
