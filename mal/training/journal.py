"""What a worker tells of its steps: losses averaged over all ranks, to TensorBoard and to the board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mal.errors import NonFiniteLossError
from mal.training.events import EventLog
from mal.training.waiting import Mark, Waiting


@dataclass
class Journal:
    """Losses of the steps since the last report. All ranks have one, the first one writes."""

    workers: int
    waiting: Waiting
    """How long the steps waited for their boxes."""
    events: EventLog | None
    """TensorBoard's; on the first rank."""
    board: Any
    """Handle of the Board actor; on the first rank."""
    _pending: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reported = self.waiting.mark()

    def begin(self) -> Mark:
        """An epoch begins: what passed since the last step is no waiting. Returns the mark of now."""
        self._reported = self.waiting.mark()
        return self._reported

    def add(self, losses: Tensor) -> None:
        """Note a step's losses [3], without waiting for them."""
        self._pending.append(losses)

    def report(self, epoch: int, steps_done: int, rate: float, boxes: int) -> float | None:
        """Average the noted losses over all ranks, check and record them. A call of all ranks together.

        Args:
            steps_done: of the optimiser, since the beginning.
            boxes: of a step, of all workers.

        Returns:
            The mean loss of these steps; None if there were none.

        Raises:
            NonFiniteLossError: on every rank alike, naming the step.
        """
        if not self._pending:
            return None
        losses = torch.stack(self._pending)
        if self.workers > 1:
            dist.all_reduce(losses)
            losses /= self.workers
        values = losses.cpu()
        first = steps_done - len(values)
        bad = (~torch.isfinite(values).all(dim=1)).nonzero()
        if len(bad):
            step = first + int(bad[0])
            raise NonFiniteLossError(
                f"the loss of step {step} (epoch {epoch}) is {values[bad[0]][0][0]:g}: training stopped, "
                "checkpoints before it are intact. Lower train.lr, or set train.use_amp=false"
            )
        self._pending = []
        mean = float(values[:, 0].mean())
        waiting = self.waiting.share(self._reported)
        if self.events is not None:
            self.events.losses(first, values, rate)
            self.events.waiting(steps_done, waiting)
        steps = {"first_step": first, "losses": values.tolist(), "rate": rate}
        self.tell({"kind": "steps", "boxes": len(values) * boxes, "loss": mean, "waiting": waiting, **steps})
        self._reported = self.waiting.mark()
        return mean

    def tell_epoch(self, number: int, of: int, steps_done: int, kpi: Mapping[str, float]) -> None:
        """Tell that epoch ``number`` (from 1 on) is done, with its figures."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in kpi.items())
        self.tell(
            {
                "kind": "epoch",
                "message": f"epoch {number} of {of} done: {figures}",
                "kpi": dict(kpi),
                "step": steps_done,
            }
        )

    def tell(self, note: dict[str, Any]) -> None:
        """Write on the board, if there is one."""
        if self.board is not None:
            import ray

            ray.get(self.board.write.remote(note))

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
