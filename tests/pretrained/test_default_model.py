"""A task without a checkpoint uses the built-in model, and nothing that contradicts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mal import pretrained
from mal.client.compose import Sources, compose
from mal.client.package import SPEC_FILE, write_working_dir
from mal.client.schema import job_schema
from mal.errors import CheckpointError, SpecError
from mal.labelling.task import file_fingerprint, make_task, result_keys
from mal.spec.checks import check_task
from mal.spec.load import load_spec

GIVEN = ["inference.ann_path=a.json", "inference.img_dir=images"]


def test_its_settings_and_its_calibration_are_used(built_in):
    spec = load_spec(None, GIVEN, "inference")
    assert spec.inference.checkpoint == pretrained.CHECKPOINT
    assert spec.inference.quality_path == pretrained.QUALITY
    assert (spec.model.arch, spec.model.mask_head_out_channel) == ("vit-deit-tiny/16", 8)
    assert (spec.dataset.crop_size, spec.train.mask_thres) == (32, (0.5,))
    assert (spec.inference.use_flip_test, spec.inference.test_margins) == (True, (0.8,))
    assert not spec.evaluate.use_flip_test  # the other task is not touched
    evaluated = load_spec(None, [], "evaluate").evaluate
    assert evaluated.use_flip_test  # what is said for inference alone holds for both
    assert evaluated.checkpoint == pretrained.CHECKPOINT


def test_test_time_options_and_calibrations_that_are_given_win(built_in):
    options = ["inference.use_flip_test=false", "inference.test_margins=null", "inference.quality_path=own.json"]
    pool = load_spec(None, [*GIVEN, *options], "inference").inference
    assert (pool.use_flip_test, pool.test_margins, pool.quality_path) == (False, None, "own.json")


def test_settings_that_contradict_it_are_named(built_in):
    wrong = [
        "model.arch=vit-mae-base/16",
        "dataset.crop_size=64",
        "train.mask_thres=[0.5]",
        "model.not_adjust_scale=true",
    ]
    with pytest.raises(SpecError) as caught:
        load_spec(None, [*GIVEN, *wrong], "inference")
    assert [problem.partition(" = ")[0] for problem in caught.value.problems] == [
        "model.arch",
        "model.not_adjust_scale",
        "dataset.crop_size",
    ]
    assert "the built-in model tiny needs 32; leave the key out" in str(caught.value)


def test_a_checkpoint_of_ones_own_is_left_alone(built_in):
    spec = load_spec(None, [*GIVEN, "inference.checkpoint=own.pth"], "inference")
    assert (spec.inference.checkpoint, spec.inference.quality_path) == ("own.pth", None)
    assert spec.model.arch == "vit-mae-base/16"
    assert load_spec(None, [], "train").model.arch == "vit-mae-base/16"


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    spec = load_spec(None, GIVEN, "inference")
    with pytest.raises(SpecError, match=r"inference\.checkpoint is not set.* has no built-in model"):
        check_task(spec, "inference", files=False)
    with pytest.raises(CheckpointError, match=r"default\.json, default\.safetensors, quality\.json not found"):
        load_spec(None, [*GIVEN, "inference.checkpoint=mal:default"], "inference")


@pytest.mark.parametrize("lost", ["default.safetensors", "quality.json"])
def test_an_incomplete_one_is_refused(files, tmp_path, monkeypatch, lost):
    folder = tmp_path / "part"
    shutil.copytree(files, folder)
    (folder / lost).unlink()
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    with pytest.raises(CheckpointError, match=f"incomplete: {lost} not found"):
        load_spec(None, GIVEN, "inference")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "settings": {}, "figures": {"mIoU": 1}}'])
def test_a_broken_description_is_refused(files, tmp_path, monkeypatch, text):
    folder = tmp_path / "broken"
    shutil.copytree(files, folder)
    (folder / "default.json").write_text(text)
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    with pytest.raises(CheckpointError, match=r"default\.json"):
        pretrained.default_model()


def test_a_run_is_bound_to_its_content(built_in):
    spec = load_spec(None, GIVEN, "inference")
    model_id = file_fingerprint(pretrained.CHECKPOINT)
    assert model_id == file_fingerprint(str(built_in / "default.safetensors"))
    keys = result_keys(spec, spec.inference, input_fingerprint="i", model_id=model_id, img_dir="x")
    assert keys["quality"] == file_fingerprint(str(built_in / "quality.json"))
    assert "model.strict" not in keys
    paths = {"folder": "f", "img_dir": "x", "checkpoint": pretrained.CHECKPOINT}
    task = make_task(spec, spec.inference, **paths, model_id=model_id, load_mask=False, gpu=False)
    assert task.checkpoint == pretrained.CHECKPOINT  # found on the node that opens it
    assert task.calibration is not None


def test_a_node_with_another_one_is_refused(built_in):
    from mal.labelling.actor import load_predictor

    spec = load_spec(None, GIVEN, "inference")
    paths = {"folder": "f", "img_dir": "x", "checkpoint": pretrained.CHECKPOINT}
    task = make_task(spec, spec.inference, **paths, model_id="0" * 16, load_mask=False, gpu=False)
    with pytest.raises(CheckpointError, match="another built-in model"):
        load_predictor(task)


def test_jobs_name_it_and_take_it_along(built_in, tmp_path):
    spec = compose("inference", Sources(overrides=GIVEN))
    assert spec.inference.checkpoint == pretrained.CHECKPOINT
    assert Path(spec.inference.ann_path or "").is_absolute()
    # On the cluster the whole spec is read again, by the package that travels with it.
    write_working_dir(tmp_path, spec, {})
    assert load_spec(str(tmp_path / SPEC_FILE), [], "inference") == spec
    assert (tmp_path / "mal" / "pretrained" / "__init__.py").is_file()


def test_a_whole_spec_of_the_schema_contradicts_nothing(built_in):
    whole = job_schema("inference")["default"]
    whole["inference"] |= {"ann_path": "a.json", "img_dir": "images"}
    spec = compose("inference", Sources(specs=json.dumps(whole)))
    assert (spec.model.arch, spec.inference.use_flip_test) == ("vit-deit-tiny/16", True)
    whole["dataset"]["crop_size"] = 96
    with pytest.raises(SpecError, match=r"dataset\.crop_size = 96: the built-in model tiny needs 32"):
        compose("inference", Sources(specs=json.dumps(whole)))
