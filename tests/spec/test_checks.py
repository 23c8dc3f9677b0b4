"""What is checked for a task before anything is started."""

from __future__ import annotations

import pytest

from mal.cli import main
from mal.errors import SpecError
from mal.spec.checks import check_task
from mal.spec.derived import label_dump_path, max_actors, per_node, results_dir, train_workers
from mal.spec.load import load_spec


@pytest.fixture
def complete(tmp_path):
    """Overrides that every task is content with."""
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "m.pth").write_bytes(b"")
    file, folder, weights = tmp_path / "a.json", tmp_path, tmp_path / "m.pth"
    return [
        f"dataset.train_ann_path={file}",
        f"dataset.train_img_dir={folder}",
        f"dataset.val_ann_path={file}",
        f"dataset.val_img_dir={folder}",
        f"evaluate.checkpoint={weights}",
        f"inference.checkpoint={weights}",
        f"inference.ann_path={file}",
        f"inference.img_dir={folder}",
    ]


@pytest.mark.parametrize("action", ["train", "evaluate", "inference"])
def test_a_complete_spec_passes(complete, action):
    check_task(load_spec(None, complete), action)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.arch=vit-deit-tinny/16", "vit-deit-tiny/16"),
        ("dataset.crop_size=500", "must be a multiple of 16 for vit-mae-base/16, such as 496 or 512"),
        ("model.feature_stride=8", "only timm/ backbones offer a choice"),
        ("train.crf_kernel_size=4", "it must be odd"),
        ("train.margin_rate=[1.2,0]", "must not exceed"),
        ("train.mask_thres=[0.1,0.2]", "one value, or three"),
        ("train.mask_thres=[1.0]", "give values below 1"),
        ("dataset.min_obj_size=1e11", "it must be below max_obj_size"),
        ("train.crf_value_low_thres=0.95", "must be below crf_value_high_thres"),
        ("inference.ann_path=/absent.json", "there is no such file or folder"),
        ("inference.img_dir=null", "is not set: inference needs it"),
        ("inference.min_actors=9", "must not exceed max_actors"),
        ("train.min_workers=2", "must not exceed the 1 workers"),
        ("train.cpu_offload=true", "only strategy=fsdp"),
    ],
)
def test_a_mistake_is_named(complete, override, problem):
    overrides = [*complete, override]
    if override == "inference.min_actors=9":
        overrides.append("inference.max_actors=4")
    with pytest.raises(SpecError, match=problem):
        check_task(load_spec(None, overrides), "inference")


def test_the_command_reports_all_mistakes_with_exit_code_2_before_anything_starts(tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text("model:\n  arch: nothing\n")
    assert main(["train", "-e", str(tmp_path / "spec.yaml"), "dataset.crop_size=33", f"results_dir={tmp_path}/r"]) == 2
    text = capsys.readouterr().err
    assert "dataset.train_ann_path is not set" in text
    assert "dataset.train_img_dir is not set" in text
    assert "nothing" in text
    assert not (tmp_path / "r").exists()


def test_numbers_that_follow():
    spec = load_spec(None, ["num_nodes=2", "train.num_gpus=1", "train.gpu_ids=[0,1,2]", "results_dir=/r"])
    assert per_node(spec.train) == 3
    assert train_workers(spec) == 6
    assert max_actors(spec, spec.inference) == 2
    assert results_dir(spec, "train") == "/r/train"
    assert label_dump_path(spec) == "/r/inference/labels.json"
