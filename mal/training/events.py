"""TensorBoard: scalars per step and sample masks per validation, written by the first worker (others: `loggers`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mal import storage


class EventLog:
    """Event files in ``<folder>/events``; for an object store they are written here and copied at `flush`."""

    def __init__(self, folder: str) -> None:
        self._target = storage.join(folder, "events")
        local = storage.local_path(self._target)
        self._spool = tempfile.TemporaryDirectory(prefix="mal-events-") if local is None else None
        self._folder = Path(self._spool.name) if self._spool else Path(str(local))
        self._writer = SummaryWriter(str(self._folder))

    def losses(self, first_step: int, values: Tensor, rate: float) -> None:
        """``values`` [steps, 3]: total, MIL and CRF loss of the steps from ``first_step`` on."""
        for place, (total, mil, crf) in enumerate(values.tolist()):
            self._writer.add_scalar("loss/total", total, first_step + place)
            self._writer.add_scalar("loss/mil", mil, first_step + place)
            self._writer.add_scalar("loss/crf", crf, first_step + place)
        self._writer.add_scalar("learning_rate", rate, first_step + len(values) - 1)

    def waiting(self, step: int, share: float) -> None:
        """Part of the time up to ``step`` in which the loader was waited for (`mal.training.waiting`)."""
        self._writer.add_scalar("waiting_share", share, step)

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        for name, value in scores.items():
            self._writer.add_scalar(f"validation/{name}", value, step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """``pixels`` [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()
        if self._spool:
            for file in self._folder.iterdir():
                storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._spool:
            self._spool.cleanup()
