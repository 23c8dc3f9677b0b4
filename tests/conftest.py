"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy or torch start their threads: spinning threads on a busy two-core machine are six times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import settings

# How long an example takes says nothing on a machine that others use as well.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference numbers and real COCO images (``MAL_SHARED``, or ``../shared`` beside the checkout)."""
    folder = Path(os.environ.get("MAL_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference" / "README.md").is_file():
        pytest.skip(f"no reference files at {folder}; set MAL_SHARED to their folder to run this comparison")
    return folder


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory: pytest.TempPathFactory):
    """A small Ray of the tests' own, for the whole session; `mal.run.cluster.connected` uses it."""
    from mal.run.cluster import connected
    from mal.spec.schema import RaySpec

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or Ray would write a token into the home folder
    os.environ.pop("RAY_ADDRESS", None)
    with connected(RaySpec(num_cpus=4, object_store_gb=0.5)) as cluster:
        yield cluster
