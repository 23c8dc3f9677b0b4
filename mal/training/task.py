"""What a training worker must know, and the files of a train folder."""

from __future__ import annotations

from dataclasses import dataclass

from mal import storage
from mal.spec.schema import Spec


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Plain values and paths that every node reaches."""

    spec: Spec
    folder: str
    train_index: str
    val_index: str | None
    workers: int
    """Those asked for: the most, if training is elastic. How many there are only the process group knows."""
    use_gpu: bool
    seed: int = 1234
    """Of weights, order and augmentation: the spec's, or one that was drawn because the spec has none."""

    @property
    def latest(self) -> str:
        return storage.join(self.folder, "mal_model_latest.pth")

    def epoch_path(self, epoch: int) -> str:
        """The checkpoint after the epoch of this number, counted from 0."""
        return storage.join(self.folder, f"model_epoch_{epoch:03d}.pth")

    def shards_path(self, epoch: int, global_step: int) -> str:
        """The folder of the sharded checkpoint after this step, taken within the epoch of this number (or at its end).

        It is deleted when later ones, or the file of its epoch, are there.
        """
        return storage.join(self.folder, f"model_epoch_{epoch:03d}_step_{global_step:08d}.dcp")

    @property
    def fatal(self) -> str:
        """Where a worker leaves an error that no restart can mend."""
        return storage.join(self.folder, "fatal_error.json")
