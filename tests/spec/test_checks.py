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


@pytest.mark.parametrize("task", ["inference.ann_path", "inference.images_path", "inference.quality_path"])
@pytest.mark.parametrize("spelling", ["{}/in.json", "file://{}/in.json", "{}/x/../in.json", "{}/linked.json"])
@pytest.mark.parametrize("look", [True, False])
def test_labels_that_would_overwrite_an_input_are_refused(complete, tmp_path, task, spelling, look):
    (tmp_path / "in.json").write_text("{}")
    (tmp_path / "linked.json").symlink_to(tmp_path / "in.json")
    path = spelling.format(tmp_path)
    spec = load_spec(None, [*complete, f"{task}={tmp_path}/in.json", f"inference.label_dump_path={path}"])
    if "linked" in spelling and not look:  # what a link means only the machine knows that has it
        check_task(spec, "inference", files=look)
        return
    with pytest.raises(SpecError) as error:
        check_task(spec, "inference", files=look)
    (problem,) = error.value.problems
    assert problem.startswith(f"inference.label_dump_path = {path!r}: it would overwrite {task}; name another file")


@pytest.mark.parametrize("name", ["labels.json", "ledger.parquet", "status.json", "manifest.json"])
def test_a_results_folder_whose_files_would_overwrite_an_input_is_refused(complete, tmp_path, name):
    folder = tmp_path / "results" / "inference"
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    overrides = [*complete, f"inference.ann_path={folder / name}"]
    with pytest.raises(SpecError, match=rf"^results_dir = .*{name} would overwrite inference.ann_path; choose another"):
        check_task(load_spec(None, [*overrides, f"results_dir={tmp_path}/results"]), "inference")
    with pytest.raises(SpecError, match=r"inference\.results_dir = .* would overwrite inference.ann_path"):
        check_task(load_spec(None, [*overrides, f"inference.results_dir={folder}"]), "inference")
    check_task(load_spec(None, [*overrides, f"results_dir={tmp_path}/other"]), "inference")


@pytest.mark.parametrize("name", ["rest.json", "part-000012.json"])
def test_files_of_shards_that_would_overwrite_an_input_are_refused(complete, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    overrides = [*complete, f"inference.ann_path={tmp_path}/out/{name}", "inference.label_files=shards"]
    with pytest.raises(SpecError, match=r"out\.json': it would overwrite inference.ann_path; name another"):
        check_task(load_spec(None, [*overrides, f"inference.label_dump_path={tmp_path}/out.json"]), "inference")
    check_task(load_spec(None, [*overrides, f"inference.label_dump_path={tmp_path}/out.json.gz"]), "inference")
    check_task(load_spec(None, [*overrides, f"inference.label_dump_path={tmp_path}/out/{name}"]), "inference")


def test_labels_that_would_overwrite_an_object_of_a_store_are_refused(complete):
    overrides = [*complete, "inference.ann_path=s3://bucket/a.json", "inference.label_dump_path=s3://bucket/a.json"]
    with pytest.raises(SpecError, match=r"it would overwrite inference\.ann_path"):
        check_task(load_spec(None, overrides), "inference", files=False)


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
