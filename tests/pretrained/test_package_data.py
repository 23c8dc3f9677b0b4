"""The built-in model is part of the package: in a wheel, and for whoever runs the package from a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mal.data.scenes import write_scenes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(files, tmp_path):
    """A folder with this package, holding the built-in model of the tests."""
    folder = tmp_path / "package"
    shutil.copytree(ROOT / "mal", folder / "mal", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / "mal" / "pretrained").glob("*.*"):
        if file.suffix != ".py":
            file.unlink()
    shutil.copytree(files, folder / "mal" / "pretrained", dirs_exist_ok=True)
    return folder


def test_a_wheel_holds_it(package, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, package / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=package, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name.removeprefix("mal/pretrained/") for name in archive.namelist() if "pretrained" in name}
    assert found == {"__init__.py", "CARD.md", "default.json", "default.safetensors", "quality.json"}


@pytest.mark.ray
@pytest.mark.slow
def test_boxes_are_labelled_in_one_command_without_training(package, tmp_path):
    scenes = write_scenes(str(tmp_path / "scenes"), images=4, seed=3, size=(96, 80))
    command = [
        *(sys.executable, "-m", "mal.cli", "inference", f"results_dir={tmp_path / 'results'}"),
        *(f"inference.ann_path={scenes.annotations}", f"inference.img_dir={scenes.images}"),
        *("inference.dump_quality=true", "inference.cpus_per_actor=0.5", "inference.max_actors=1"),
        *("ray.num_cpus=4", "ray.object_store_gb=0.2"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(package), "RAY_AUTH_MODE": "disabled"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint: the built-in model tiny" in ran.stdout
    assert (
        "mean IoU 0.700 over boxes, 0.650 over classes; its quality ranks masks with a correlation of 0.50"
        in ran.stdout
    )
    folder = tmp_path / "results" / "inference"
    labels = json.loads((folder / "labels.json").read_text())["annotations"]
    assert len(labels) == len(json.loads(Path(scenes.annotations).read_text())["annotations"])
    assert all(0.25 <= label["quality"] <= 0.65 for label in labels)  # what the calibration knows
    rows = pq.read_table(folder / "shards")
    assert None not in rows["agreement"].to_pylist()  # of the mirrored view that the settings ask for
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["built_in_model"] == {
        "name": "tiny",
        "figures": {"box_mean_iou": 0.7, "mIoU": 0.65, "spearman": 0.5},
    }
