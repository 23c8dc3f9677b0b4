"""What binds a results folder, and what does not."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from mal.labelling.task import Sealed, make_task, result_keys
from mal.spec.load import load_spec
from mal.spec.schema import InferenceSpec

FREE = {
    "min_actors": 2,
    "max_actors": 7,
    "num_gpus": 3,
    "gpu_ids": "[0,1]",
    "cpus_per_actor": 3,
    "decode": "nodes",
    "decode_threads": 9,
    "batch_size": 17,
    "shard_boxes": 99,
    "label_files": "shards",
    "label_dump_path": "other.json",
    "mask_format": "polygon",
    "dump_quality": "true",
    "min_quality": 0.5,
    "low_quality": "drop",
}
"""Keys of `inference` that may change between two attempts: they change who does the work, or the view of the rows."""
BOUND = {
    "precision": "fp32",
    "use_teacher_test": "true",
    "use_mixed_model_test": "true",
    "use_flip_test": "true",
    "use_crf_test": "true",
    "test_margins": "[0.3]",
    "fill_holes": "true",
    "largest_component": "true",
    "min_component_area": 9,
}
"""Keys that change the rows."""
BY_CONTENT = {"checkpoint", "ann_path", "images_path", "img_dir", "load_mask", "quality_path", "results_dir"}
"""Keys that name files: what they hold is in the manifest, where it matters (`mal.labelling.run.run_keys`)."""


def _keys(*overrides: str) -> dict[str, object]:
    spec = load_spec(None, [*overrides])
    return result_keys(spec, spec.inference, input_fingerprint="i", model_id="m", img_dir="/x")


@pytest.mark.parametrize("key", FREE)
def test_keys_that_may_change_between_attempts(key):
    assert _keys(f"inference.{key}={FREE[key]}") == _keys()


@pytest.mark.parametrize("key", BOUND)
def test_keys_that_change_the_rows(key):
    assert _keys(f"inference.{key}={BOUND[key]}") != _keys()


def test_every_key_is_one_or_the_other():
    names = {field.name for field in dataclasses.fields(InferenceSpec)}
    assert names == set(FREE) | set(BOUND) | BY_CONTENT


def test_a_task_on_its_way_to_an_actor_shows_no_secret(monkeypatch):
    """Ray Data writes the constructor's arguments of a pool into what it tells of a run."""
    from ray.data._internal.metadata_exporter import sanitize_for_struct

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-of-s3")
    spec = load_spec(None, ["encryption_key=s3cr3t-of-weights"])
    own = {"folder": "f", "img_dir": "s3://b/x", "checkpoint": "c", "model_id": "m"}
    task = make_task(spec, spec.inference, **own, load_mask=False, gpu=False)
    assert "s3cr3t" in str(sanitize_for_struct(task)), "what is looked for would show"
    sealed = Sealed(task)
    assert "s3cr3t" not in str(sanitize_for_struct({"args": (sealed,)}))
    assert "s3cr3t" not in repr(sealed)
    assert pickle.loads(pickle.dumps(sealed)).open() == task
