"""The Grafana dashboard: whole, and true to the metrics that are exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mal.labelling import figures as labelling
from mal.training import figures as training

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
EXPORTED = {f"ray_mal_{name}" for name in (*labelling.METRICS, *training.METRICS)}


@pytest.fixture
def dashboard():
    return json.loads(DASHBOARD.read_text())


def test_it_names_exactly_the_metrics_that_are_exported(dashboard):
    named = {m for p in dashboard["panels"] for t in p["targets"] for m in re.findall(r"ray_\w+", t["expr"])}
    assert named == EXPORTED


def test_its_panels_have_numbers_and_places_of_their_own_and_its_variables_exist(dashboard):
    panels = dashboard["panels"]
    assert (
        len({p["id"] for p in panels}) == len(panels) == len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels})
    )
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables
    for target in (t for p in panels for t in p["targets"]):
        assert target["expr"].count("(") == target["expr"].count(")")
        assert target["expr"].count("{") == target["expr"].count("}")


def test_what_training_shows_is_among_its_metrics():
    shown = training.figures(150, 100, 7.0, 0.5, 0.25)
    rest = {"train_boxes_per_second": 7.0, "train_loss": 0.5, "train_waiting_share": 0.25}
    assert shown == {"train_epoch": 1.5, **rest}
    assert training.of_validation({"train_loss": 0.5}) == {}
    assert {*shown, *training.of_validation({"mIoU": 0.4})} == set(training.METRICS)
