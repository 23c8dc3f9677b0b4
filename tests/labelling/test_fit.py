"""A checkpoint that does not fit stops a run before the folder is bound to anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mal.errors import CheckpointError
from mal.inference.launch import run_inference
from mal.labelling.fit import check_checkpoint
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec

MODEL = ["model.arch=vit-deit-tiny/16", "model.mask_head_hidden_channel=8", "model.mask_head_out_channel=8"]


def spec_of(path, *more):
    return load_spec(None, [*MODEL, "dataset.crop_size=32", f"inference.checkpoint={path}", *more])


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return StudentTeacher(build_network(spec_of("x").model, crop_size=32)).state_dict()


def saved(state, folder, name="c.pth"):
    torch.save({"state_dict": state}, folder / name)
    return folder / name


def test_what_was_recognised_and_matched_is_told(pair, tmp_path):
    path = saved(pair | {"student.backbone.head.weight": torch.zeros(3)}, tmp_path)
    spec = spec_of(path, "inference.use_mixed_model_test=true")
    told = check_checkpoint(spec, spec.inference)
    assert told.startswith(
        f"{path}: a checkpoint of another mask auto-labeler, with student and teacher, vit-deit-tiny/16"
    )
    assert told.endswith("162 tensors loaded, 1 ignored (backbone.head.weight)")


def test_a_network_that_is_asked_for_and_not_there(pair, tmp_path):
    path = saved({key: value for key, value in pair.items() if key.startswith("student.")}, tmp_path)
    spec = spec_of(path, "inference.use_mixed_model_test=true")
    with pytest.raises(CheckpointError, match="holds no teacher"):
        check_checkpoint(spec, spec.inference)


def test_a_wrong_architecture_leaves_the_folder_free(line, tmp_path):
    """Corrected, the same command works: the folder was not bound to the mistake."""
    spec = line.spec(tmp_path, "model.arch=vit-deit-small/16")
    with pytest.raises(CheckpointError, match=r"holds vit-deit-tiny/16, but the spec's model is vit-deit-small/16"):
        run_inference(spec)
    assert not (tmp_path / "manifest.json").exists()


def test_names_that_differ_are_an_error_unless_strict_is_false(pair, tmp_path):
    state = dict(pair)
    del state["student.roi_head.mlp2.bias"]
    path = saved(state, tmp_path)
    spec = spec_of(path)
    with pytest.raises(CheckpointError, match=r"lacks roi_head\.mlp2\.bias"):
        check_checkpoint(spec, spec.inference)
    lax = dataclasses.replace(spec, model=dataclasses.replace(spec.model, strict=False))
    assert "1 missing (roi_head.mlp2.bias)" in check_checkpoint(lax, lax.inference)


def test_strict_false_labels_with_what_fits(pair, tmp_path):
    from mal.labelling.actor import load_predictor
    from mal.labelling.task import file_fingerprint, make_task

    state = {key: value for key, value in pair.items() if key != "student.roi_head.mlp2.bias"}
    spec = spec_of(saved(state, tmp_path), "model.strict=false")
    paths = {"folder": "f", "img_dir": "x", "checkpoint": spec.inference.checkpoint}
    content = file_fingerprint(str(spec.inference.checkpoint))
    task = make_task(spec, spec.inference, **paths, model_id=content, load_mask=False, gpu=False)
    (network,) = load_predictor(task).networks
    assert torch.equal(network.roi_head.mlp1.weight, pair["student.roi_head.mlp1.weight"])
    with Path(str(spec.inference.checkpoint)).open("ab") as file:  # training goes on and replaces it, say
        file.write(b"x")
    with pytest.raises(CheckpointError, match="no longer what it was when this run began"):
        load_predictor(task)


@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/swin_tiny_patch4_window7_224", "timm/resnet18"])
def test_backbones_of_timm_are_checked_too(name, tmp_path):
    settings = [f"model.arch={name}", "model.mask_head_hidden_channel=8", "model.mask_head_out_channel=8"]
    spec = load_spec(None, [*settings, "dataset.crop_size=64", f"inference.checkpoint={tmp_path}/c.pth"])
    saved(StudentTeacher(build_network(spec.model, crop_size=64)).state_dict(), tmp_path)
    assert "missing" not in check_checkpoint(spec, spec.inference)
