"""The whole line on a tiny data set: train, evaluate, label, by the commands that people use."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mal import rows
from mal.cli import main
from mal.data.scenes import write_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = [
    "dataset.crop_size=32",
    "dataset.min_obj_size=100",
    "dataset.num_workers_per_gpu=0",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "train.num_epochs=2",
    "train.batch_size=8",
    "train.num_gpus=2",
    "train.crf_num_iter=2",
    "train.use_amp=false",
    "train.cpus_per_worker=0.5",
    "train.loggers=[tensorboard,mlflow]",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Ten scenes as a COCO file, with odd annotations added: carried fields, a crowd, boxes that cannot be labelled."""
    folder = tmp_path_factory.mktemp("scenes")
    paths = write_scenes(str(folder), images=10, seed=5, size=(160, 120))
    document = json.loads((folder / "annotations.json").read_text())
    first = document["annotations"][0]
    first["painter"] = {"name": "Ünal", "sure": 0.25}
    height, width = 120, 160
    crowd = {"size": [height, width], "counts": [0, height * width]}
    odd = [
        {"bbox": [-5, -5, 30, 30]},
        {"bbox": [500, 500, 30, 30]},
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [1, 2, 3]},
        {"image_id": 999, "bbox": [1, 1, 5, 5]},
        {"bbox": [0, 0, width, height], "iscrowd": 1, "segmentation": crowd, "note": "kept"},
    ]
    document["annotations"] += [{"id": 9000 + k, "image_id": 1, "category_id": 1, **o} for k, o in enumerate(odd)]
    document["more"] = {"anything": [1, 2, 3]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return paths


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory, ray_here):
    """A results folder after ``mal train``, and the common arguments."""
    results = tmp_path_factory.mktemp("results")
    spec = results / "spec.yaml"
    spec.write_text("strategy: ddp\n")
    arguments = [
        "-e",
        str(spec),
        f"results_dir={results}",
        f"dataset.train_ann_path={scenes.annotations}",
        f"dataset.train_img_dir={scenes.images}",
        f"dataset.val_ann_path={scenes.annotations}",
        f"dataset.val_img_dir={scenes.images}",
        *SMALL,
    ]
    assert main(["train", *arguments]) == 0
    return results, arguments


def test_training_leaves_checkpoints_status_and_events(trained):
    results, _ = trained
    train = results / "train"
    assert {"model_epoch_000.pth", "model_epoch_001.pth", "mal_model_latest.pth"} <= {p.name for p in train.iterdir()}
    content = torch.load(train / "mal_model_latest.pth", weights_only=True)
    assert content["epoch"] == 2
    assert content["spec"]["dataset"]["crop_size"] == 32
    names = set(content["state_dict"])
    assert {n.partition(".")[0] for n in names} == {"student", "teacher"}
    assert len(content["optimizer"]["state"]) > 100
    states = [json.loads(line) for line in (train / "status.json").read_text().splitlines()]
    assert (states[0]["status"], states[-1]["status"]) == ("STARTED", "SUCCESS")
    assert {s["status"] for s in states[1:-1]} == {"RUNNING"}
    epochs = [s for s in states if "kpi" in s and "mIoU" in s["kpi"]]  # on a slow machine there are other lines, too
    assert [s["message"].partition(" done")[0] for s in epochs] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert 0 < epochs[-1]["kpi"]["mIoU"] < 1
    assert any((train / "events").iterdir())


def test_a_finished_training_is_not_done_again_and_more_epochs_go_on(trained, capsys):
    results, arguments = trained
    before = (results / "train" / "model_epoch_001.pth").stat().st_mtime_ns
    assert main(["train", *arguments, "train.num_epochs=3", f"train.results_dir={results}/train"]) == 0
    assert "epoch 3 of 3 done" in capsys.readouterr().out
    assert (results / "train" / "model_epoch_001.pth").stat().st_mtime_ns == before
    assert torch.load(results / "train" / "mal_model_latest.pth", weights_only=True)["epoch"] == 3


def test_both_trainings_are_one_run_of_mlflow(trained):
    from mlflow import MlflowClient

    folder = trained[0] / "train"
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(json.loads((folder / "loggers.json").read_text())["mlflow"])
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
    done = torch.load(folder / "mal_model_latest.pth", weights_only=True)
    assert steps == list(range(done["global_step"]))
    assert len(client.get_metric_history(run.info.run_id, "epoch/train_loss")) == done["epoch"]


def _check_summary(results, action, stages):
    summary = json.loads((results / action / "summary.json").read_text())
    assert list(summary["seconds_by_stage"]) == stages
    assert sum(summary["seconds_by_stage"].values()) <= summary["seconds"] + 0.1
    assert summary["nodes"][0]["cpus"] == 4.0
    assert summary["nodes"][0]["memory_gb"] > 0
    assert summary["spec"]["dataset"]["crop_size"] == 32
    assert "commit" in summary
    return summary


def test_another_model_is_refused(trained, capsys):
    _, arguments = trained
    assert main(["train", *arguments, "model.mask_head_out_channel=16"]) == 1
    assert "model.mask_head_out_channel: 8 there, 16 in the spec" in capsys.readouterr().err


def test_every_annotation_is_accounted_for_and_comes_back(trained, scenes, capsys):
    results, arguments = trained
    labels = results / "labels.json"
    inference = [
        *arguments,
        f"inference.checkpoint={results}/train/model_epoch_001.pth",
        f"inference.ann_path={scenes.annotations}",
        f"inference.img_dir={scenes.images}",
        f"inference.label_dump_path={labels}",
        "inference.load_mask=true",
        "inference.shard_boxes=16",
        "inference.cpus_per_actor=0.5",
    ]
    assert main(["inference", *inference]) == 0
    given = json.loads(Path(scenes.annotations).read_text())
    found = json.loads(labels.read_text())
    _check_labels(given, found)
    COCO(str(labels))
    ledger = pq.read_table(results / "inference" / "ledger.parquet")
    assert ledger.schema == rows.LEDGER
    assert sorted(ledger["position"].to_pylist()) == list(range(len(given["annotations"])))
    rejected = ledger.filter(pa.compute.equal(ledger["outcome"], "rejected")).to_pylist()
    assert {row["id"]: row["reason"].partition(":")[0] for row in rejected} == {
        9001: "outside",
        9002: "empty_box",
        9003: "bad_bbox",
        9004: "unknown_image",
    }
    summary = json.loads((results / "inference" / "summary.json").read_text())
    assert summary["clipped"] == sum(1 for a in given["annotations"] if a["id"] == 9000)
    assert summary["annotations"] == len(given["annotations"])
    _check_summary(results, "inference", ["index", "start", "label", "merge"])
    summary = _check_summary(results, "train", ["index", "start", "train"])
    assert (summary["epochs"] >= 2, summary["workers"]) == (True, 2)

    # The same command again does nothing new; a lost shard alone is done again, and nothing changes.
    shards = sorted((results / "inference" / "shards").glob("part-*.parquet"))
    assert len(shards) > 2
    times = {p: p.stat().st_mtime_ns for p in shards}
    text = labels.read_bytes()
    shards[1].unlink()
    assert main(["inference", *inference, "inference.batch_size=2"]) == 0
    assert [p for p in shards if p.stat().st_mtime_ns != times[p]] == [shards[1]]
    assert len(json.loads(labels.read_bytes())["annotations"]) == len(json.loads(text)["annotations"])
    assert main(["inference", *inference, "dataset.crop_size=48"]) == 1
    assert "dataset.crop_size: begun with 32, now 48" in capsys.readouterr().err


def _check_labels(given, found):
    """``found``: the merged file; every box that can be labelled once, everything else as it was."""
    assert {k: v for k, v in found.items() if k != "annotations"} == {
        k: v for k, v in given.items() if k != "annotations"
    }
    by_id = {a["id"]: a for a in found["annotations"]}
    assert len(by_id) == len(found["annotations"]) == len(given["annotations"]) - 4
    assert by_id[9005] == given["annotations"][-1]
    assert by_id[given["annotations"][0]["id"]]["painter"] == {"name": "Ünal", "sure": 0.25}
    for annotation in given["annotations"]:
        if annotation["id"] >= 9000:
            continue
        label = by_id[annotation["id"]]
        assert label["bbox"] == annotation["bbox"]
        assert label["segmentation"]["size"] == [120, 160]
        mask = coco_mask.decode(label["segmentation"])
        assert label["area"] == mask.sum()
        assert 0.0 <= label["iou"] <= 1.0


def test_evaluation_gives_the_same_figures_for_one_and_for_two_actors(trained, capsys):
    results, arguments = trained
    metrics = []
    for actors in (1, 2):
        own = [f"evaluate.results_dir={results}/evaluate{actors}", f"evaluate.max_actors={actors}"]
        pool = ["evaluate.shard_boxes=16", "evaluate.cpus_per_actor=0.5"]
        checkpoint = f"evaluate.checkpoint={results}/train/model_epoch_001.pth"
        assert main(["evaluate", *arguments, checkpoint, *own, *pool]) == 0
        metrics.append(json.loads((results / f"evaluate{actors}" / "metrics.json").read_text()))
        _check_summary(results, f"evaluate{actors}", ["index", "start", "label", "measure"])
    assert metrics[0] == metrics[1]
    assert 0 < metrics[0]["mIoU"] < 1
    assert "mean of boxes" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["use_teacher_test", "use_mixed_model_test", "use_flip_test"])
def test_evaluation_options_change_the_figures(trained, option):
    results, arguments = trained
    folder = f"{results}/evaluate_{option}"
    checkpoint = f"evaluate.checkpoint={results}/train/model_epoch_001.pth"
    assert main(["evaluate", *arguments, checkpoint, f"evaluate.{option}=true", f"evaluate.results_dir={folder}"]) == 0
    metrics = json.loads(Path(f"{folder}/metrics.json").read_text())
    assert 0 < metrics["mIoU"] < 1
