"""What a submitted job runs on the cluster: ``python -m mal.client.entry train|evaluate|inference|pause``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mal.cli import main as run_command
from mal.client.package import PAUSE, SPEC_FILE
from mal.errors import MalError
from mal.run import pause, secrets


def main(arguments: Sequence[str]) -> int:
    """Run a task on the spec in the working directory, or ask the run in a folder to pause; returns the exit code."""
    secrets.load()
    if arguments[0] == PAUSE:
        folder, attempt = arguments[1:]
        try:
            pause.ask(folder, attempt)
        except MalError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    return run_command([arguments[0], "-e", SPEC_FILE])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A cancelled job ends like one that Ctrl-C stops: status.json says so."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
