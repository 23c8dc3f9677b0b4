"""A train folder."""

from __future__ import annotations

import pytest
from tiny_training import tiny_spec

from mal.training.task import TrainTask


@pytest.fixture
def train_task(tmp_path):
    def make(*overrides: str) -> TrainTask:
        return TrainTask(tiny_spec(*overrides), str(tmp_path / "train"), "", None, 1, False)

    return make
