"""A detector's result list through the whole line: masks with scores, average precision; and the quality report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mal.cli import main
from mal.data.scenes import write_scenes
from mal.evaluation.quality_report import ESTIMATES
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = ["model.arch=vit-deit-tiny/16", "model.mask_head_hidden_channel=8", "model.mask_head_out_channel=8"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Scenes, a result list with scores on their boxes, and the arguments of a network that was not trained."""
    folder = tmp_path_factory.mktemp("detector")
    scenes = write_scenes(str(folder), images=10, seed=7, size=(160, 120))
    truth = json.loads(Path(scenes.annotations).read_text())
    rng = np.random.default_rng(0)
    results = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": round(float(rng.random()), 3)}
        for a in truth["annotations"]
    ]
    (folder / "results.json").write_text(json.dumps(results))
    torch.manual_seed(0)
    model = load_spec(None, MODEL).model
    state = StudentTeacher(build_network(model, crop_size=32)).state_dict()
    torch.save({"state_dict": state}, folder / "network.pth")
    spec = folder / "spec.yaml"
    spec.write_text(f"results_dir: {folder}/results\n")
    arguments = [
        *("-e", str(spec), *MODEL, "dataset.crop_size=32"),
        *(f"dataset.val_ann_path={scenes.annotations}", f"dataset.val_img_dir={scenes.images}"),
        *(f"evaluate.checkpoint={folder}/network.pth", "evaluate.cpus_per_actor=0.5", "evaluate.max_actors=1"),
    ]
    return folder, scenes, results, arguments


def test_masks_for_a_detectors_boxes_carry_its_scores(detector, ray_here, capsys):
    folder, scenes, results, arguments = detector
    inference = [
        *(f"inference.checkpoint={folder}/network.pth", f"inference.ann_path={folder}/results.json"),
        *(f"inference.images_path={scenes.annotations}", f"inference.img_dir={scenes.images}"),
        *("inference.cpus_per_actor=0.5", "inference.max_actors=1", "inference.dump_quality=true"),
        "inference.fill_holes=true",
    ]
    assert main(["inference", *arguments, *inference]) == 0
    labels = json.loads((folder / "results/inference/labels.json").read_text())
    by_score = sorted((a["score"], tuple(a["bbox"])) for a in labels["annotations"])
    assert by_score == sorted((r["score"], tuple(r["bbox"])) for r in results)
    assert all(0 <= a["quality"] <= 1 for a in labels["annotations"])
    plain = [(a["id"], a["area"]) for a in labels["annotations"]]

    # The COCO file is a view of the shards: the same masks as polygons need no new labelling, others do.
    capsys.readouterr()
    assert main(["inference", *arguments, *inference, "inference.mask_format=polygon"]) == 0
    assert "0 of 1 shards to do" in capsys.readouterr().out
    again = json.loads((folder / "results/inference/labels.json").read_text())["annotations"]
    assert [(a["id"], a["area"]) for a in again] == plain
    assert any(isinstance(a["segmentation"], list) for a in again)
    assert main(["inference", *arguments, *inference, "inference.largest_component=true"]) == 1
    assert "largest_component: begun with False, now True" in capsys.readouterr().err


def test_average_precision_of_a_detectors_boxes(detector, ray_here, capsys):
    folder, _, _, arguments = detector
    options = ["evaluate.use_crf_test=true", "train.crf_num_iter=5", "evaluate.test_margins=[0.2,1]"]
    assert main(["evaluate", *arguments, f"evaluate.detections_path={folder}/results.json", *options]) == 0
    found = json.loads((folder / "results/evaluate/metrics.json").read_text())["average_precision"]
    assert found["bbox"]["AP"] == pytest.approx(1.0, abs=0.01)  # its boxes are the true ones
    assert 0 <= found["segm"]["AP"] < 1
    assert "AP75" in capsys.readouterr().out
    (run,) = (folder / "results/evaluate/runs").iterdir()
    assert "-crf-margins0.2_1-" in run.name


def test_evaluation_calibrates_quality_and_inference_uses_it(detector, ray_here, capsys):
    folder, scenes, _, arguments = detector
    assert main(["evaluate", *arguments, "evaluate.use_flip_test=true", "evaluate.per_box=both"]) == 0
    out = capsys.readouterr().out
    assert "quality of masks" in out
    assert "boundary %" in out
    metrics = json.loads((folder / "results/evaluate/metrics.json").read_text())
    each = pq.read_table(folder / "results/evaluate/boxes.parquet")
    for name, figures in (("iou", metrics), ("boundary_iou", metrics["boundary"])):
        assert np.mean(each[name].to_numpy()) == pytest.approx(figures["box_mean_iou"])
        assert 0 < figures["mIoU"] < 1
    assert each["iou"].to_pylist() == sorted(each["iou"].to_pylist())
    assert len((folder / "results/evaluate/boxes.csv").read_text().splitlines()) == 1 + each.num_rows
    report = json.loads((folder / "results/evaluate/quality.json").read_text())
    assert report["boxes"] >= 50
    assert set(report) == {"boxes", *ESTIMATES, "calibration"}
    assert len(report["calibration"]["classes"]) > 1
    assert report["calibrated"]["expected_calibration_error"] < 0.3
    inference = [
        *(f"inference.checkpoint={folder}/network.pth", f"inference.ann_path={scenes.annotations}"),
        *(f"inference.img_dir={scenes.images}", f"inference.results_dir={folder}/calibrated"),
        *("inference.dump_quality=true", "inference.cpus_per_actor=0.5", "inference.max_actors=1"),
        *(f"inference.quality_path={folder}/results/evaluate/quality.json", "inference.use_flip_test=true"),
    ]
    assert main(["inference", *arguments, *inference]) == 0
    labels = json.loads((folder / "calibrated/labels.json").read_text())["annotations"]
    values = report["calibration"]["quality"]
    assert all(values[0] - 1e-6 <= a["quality"] <= values[-1] + 1e-6 for a in labels)
    assert len({a["quality"] for a in labels}) > 1
