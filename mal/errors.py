"""Every error a user can meet. All are picklable, so they cross process borders unchanged.

MalError                  a sentence for the user: what, which value, what to do          exit code 1
├── SpecError             the spec or the command line is wrong; carries every problem    exit code 2
├── InputError            an input file as a whole cannot be used
├── StorageError          a path cannot be read or written
├── CheckpointError       a checkpoint cannot be loaded or does not fit the model
├── RunMismatchError      a results folder was begun with other inputs
├── ClusterError          Ray cannot give what the spec asks for, or cannot be reached
├── RunPausedError        the run was asked to pause, and has saved its work              exit code 3
└── TrainingError         training cannot go on
    ├── NonFiniteLossError    the loss is NaN or infinite
    └── OutOfMemoryError      the device has too little memory for a batch
"""

from __future__ import annotations

from collections.abc import Sequence


class MalError(Exception):
    """A mistake or a state of the world that the user can do something about."""

    exit_code = 1


class SpecError(MalError):
    """The spec is wrong. ``problems`` holds one line per mistake: dotted key, value, remedy."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} mistakes in the spec:\n" + "\n".join(f"  - {p}" for p in self.problems)


class InputError(MalError):
    """An input file as a whole cannot be used (single bad boxes go to the ledger instead)."""


class StorageError(MalError):
    """A path cannot be read or written."""


class CheckpointError(MalError):
    """A checkpoint cannot be loaded safely, or does not fit the model of the spec."""


class WrongKeyError(CheckpointError):
    """A checkpoint is encrypted, and its key is missing or wrong."""


class RunMismatchError(MalError):
    """The results folder was begun with another input, model or spec; the message names what differs."""


class ClusterError(MalError):
    """The Ray cluster at hand cannot give what the spec asks for."""


class RunPausedError(MalError):
    """The run was asked to pause; what it has done is saved, and the same command goes on."""

    exit_code = 3


class TrainingError(MalError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; the message names epoch and step."""


class OutOfMemoryError(TrainingError):
    """The device ran out of memory; the message names batch and crop size and what to lower."""
