"""Reading specs: every mistake at once, each with its key, value and remedy."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal.errors import SpecError
from mal.spec.load import load_spec, spec_from_values, spec_to_values
from mal.spec.schema import Spec

SAMPLE = """
strategy: 'fsdp'
results_dir: '/path/to/result/dir'
dataset:
  train_ann_path: '/datasets/coco/annotations/instances_train2017.json'
  train_img_dir: '/datasets/coco/raw-data/train2017'
  val_ann_path: '/coco/annotations/instances_val2017.json'
  val_img_dir: '/coco/raw-data/val2017'
  load_mask: True
  crop_size: 512
inference:
  ann_path: '/dataset/sample.json'
  img_dir: '/dataset/sample_dir'
  label_dump_path: '/dataset/sample_output.json'
model:
  arch: 'vit-mae-base/16'
train:
  num_epochs: 10
  checkpoint_interval: 5
  validation_interval: 5
  batch_size: 4
  seed: 1234
  num_gpus: 1
  gpu_ids: [0]
  use_amp: True
  optim_momentum: 0.9
  lr: 0.0000015
  min_lr_rate: 0.2
  wd: 0.0005
  warmup_epochs: 1
  crf_kernel_size: 3
  crf_num_iter: 100
  loss_mil_weight: 4
  loss_crf_weight: 0.5
"""


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SAMPLE)
    return str(path)


def test_the_published_sample_spec_loads_unchanged(sample):
    spec = load_spec(sample)
    assert spec.strategy == "fsdp"
    assert spec.train.lr == 1.5e-6
    assert spec.train.warmup_epochs == 1.0
    assert spec.model.frozen_stages == (-1,)
    assert spec.dataset.min_obj_size == 2048


def test_an_override_wins_over_the_file_and_the_file_over_the_default(sample):
    spec = load_spec(sample, ["train.lr=3e-5", "train.gpu_ids=[0,1]", "dataset.val_ann_path=null"])
    assert (spec.train.lr, spec.train.gpu_ids, spec.dataset.val_ann_path) == (3e-5, (0, 1), None)
    assert spec.train.num_epochs == 10


def test_a_reference_to_another_key_is_resolved(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("results_dir: /r\nevaluate:\n  checkpoint: ${results_dir}/train/mal_model_latest.pth\n")
    assert load_spec(str(path)).evaluate.checkpoint == "/r/train/mal_model_latest.pth"


def test_all_mistakes_are_reported_at_once(sample):
    overrides = [
        "train.lr=fast",
        "train.num_epoch=3",
        "dataset.crop_size=-1",
        "model.arch=7.5",
        "strategy=magic",
        "x=1",
    ]
    with pytest.raises(SpecError) as caught:
        load_spec(sample, overrides)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 5
    assert "train.lr = 'fast': it must be a number" in text
    assert "train.num_epoch = 3: unknown key; did you mean train.num_epochs?" in text
    assert "dataset.crop_size = -1: it must be at least 32" in text
    assert "strategy = 'magic': it must be one of 'ddp', 'fsdp'" in text
    assert "x = 1: unknown key" in text


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("train.batch_size=0", "at least 1"),
        ("train.batch_size=2.5", "a whole number"),
        ("train.batch_size=true", "a whole number"),
        ("train.use_amp=1", "true or false"),
        ("train.optim_betas=[0.9]", "a list of 2"),
        ("train.optim_betas=[0.9,x]", "a number, in a list"),
        ("train.gpu_ids=[]", "an empty list"),
        ("train=5", "a section of keys"),
        ("train.lr=null", "must not be empty"),
        ("train.lr=.nan", "more than 0"),
        ("train.seed", "written section.key=value"),
    ],
)
def test_each_kind_of_mistake(override, mistake):
    with pytest.raises(SpecError, match=mistake):
        load_spec(None, [override])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"absent\.yaml.*no such file"):
        load_spec(str(tmp_path / "absent.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1\n")
    with pytest.raises(SpecError, match="not valid YAML"):
        load_spec(str(broken))
    broken.write_text("- a\n- b\n")
    with pytest.raises(SpecError, match="a mapping of sections"):
        load_spec(str(broken))


def test_the_encryption_key_is_in_no_saved_spec_and_no_message():
    spec = load_spec(None, ["encryption_key=hunter2"])
    assert spec.encryption_key == "hunter2"
    assert "hunter2" not in repr(spec)
    assert "hunter2" not in str(spec_to_values(spec))
    with pytest.raises(SpecError) as caught:
        load_spec(None, ["encryption_key=[hunter2]"])
    assert "hunter2" not in str(caught.value)


def _sections(cls):
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from _sections(hint)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_spec_survives_being_written_and_read(data):
    spec = Spec()
    for name in ("train", "dataset", "inference"):
        section = getattr(spec, name)
        numbers = [f.name for f in dataclasses.fields(section) if type(getattr(section, f.name)) is int]
        key = data.draw(st.sampled_from(numbers))
        section = dataclasses.replace(section, **{key: getattr(section, key) + data.draw(st.integers(0, 3))})
        spec = dataclasses.replace(spec, **{name: section})
    assert spec_from_values(spec_to_values(spec)) == spec


def test_every_default_is_within_its_own_bounds():
    assert spec_from_values(spec_to_values(Spec())) == Spec()


def test_every_key_has_a_line_of_meaning():
    from mal.spec.document import meanings

    for cls in _sections(Spec):
        names = {f.name for f in dataclasses.fields(cls)}
        assert names == set(meanings(cls)), cls
