"""Environment variables that must not be seen: from the file in a job's working directory into every process of it.

Ray's job server returns the environment of a runtime env in clear to whoever asks, so secrets travel in the uploaded
package instead. `load` runs first in the job's driver, and in every worker process as Ray's
``worker_process_setup_hook``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "secrets.json"


def load() -> None:
    """Set the variables of ``secrets.json`` in the working directory, if it is there, unless they are set already."""
    path = Path(FILE)
    if path.is_file():
        for name, value in json.loads(path.read_text()).items():
            os.environ.setdefault(name, value)
