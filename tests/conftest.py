"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy or torch start their threads: spinning threads on a busy two-core machine are six times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference numbers and real COCO images (``MAL_SHARED``, or ``../shared`` beside the checkout)."""
    folder = Path(os.environ.get("MAL_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference" / "README.md").is_file():
        pytest.skip(f"no reference files at {folder}; set MAL_SHARED to their folder to run this comparison")
    return folder
