"""What a job's spec is made of, and what a job takes along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mal.client import package
from mal.client.compose import Sources, compose
from mal.client.schema import job_schema
from mal.client.server import server_address
from mal.errors import ClusterError, SpecError
from mal.spec.load import load_spec, spec_from_values

DATA = ["dataset.train_ann_path=/d/train.json", "dataset.train_img_dir=/d/images"]


def test_later_sources_win_and_nulls_count_as_not_given(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("train: {lr: 0.5, wd: 0.5, num_epochs: 7}\nresults_dir: null\n")
    sources = Sources(
        base_experiment="vit-deit-tiny/16:scratch",
        file=str(file),
        specs=json.dumps({"train": {"wd": 0.25, "num_epochs": 8, "pretrained_model_path": None}}),
        overrides=[*DATA, "train.num_epochs=9"],
    )
    spec = compose("train", sources)
    assert spec.model.arch == "vit-deit-tiny/16"
    assert (spec.train.lr, spec.train.wd, spec.train.num_epochs, spec.results_dir) == (0.5, 0.25, 9, "/results")


def test_a_child_takes_its_parents_checkpoint_data_and_network():
    parent = load_spec(None, [*DATA, "dataset.crop_size=64", "model.arch=vit-deit-small/16", "results_dir=/r"])
    inputs = ["inference.ann_path=/d/boxes.json", "inference.img_dir=/d/images"]
    child = compose("inference", Sources(parent=("train", parent), overrides=inputs))
    assert child.inference.checkpoint == "/r/train/mal_model_latest.pth"
    assert (child.dataset.crop_size, child.model.arch, child.results_dir) == (64, "vit-deit-small/16", "/r")
    again = compose("train", Sources(parent=("train", parent), overrides=["train.lr=1e-5"]))
    assert again.train.pretrained_model_path == "/r/train/mal_model_latest.pth"
    assert again.results_dir != "/r"
    own = compose("inference", Sources(parent=("inference", child), overrides=["inference.batch_size=2", *inputs]))
    assert own.inference.checkpoint == child.inference.checkpoint


def test_the_default_of_the_schema_does_not_hide_the_parents_checkpoint():
    parent = load_spec(None, DATA)
    specs = job_schema("inference")["default"]
    specs["inference"] |= {"ann_path": "/d/boxes.json", "img_dir": "/d/images"}
    child = compose("inference", Sources(parent=("train", parent), specs=json.dumps(specs)))
    assert child.inference.checkpoint == "/results/train/mal_model_latest.pth"


def test_paths_are_absolute_and_need_not_exist_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = compose(
        "train", Sources(overrides=["dataset.train_ann_path=a.json", "dataset.train_img_dir=s3://b/i", "results_dir=r"])
    )
    assert spec.dataset.train_ann_path == f"{tmp_path}/a.json"
    assert spec.dataset.train_img_dir == "s3://b/i"
    assert spec.results_dir == f"{tmp_path}/r"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (Sources(specs="{"), "--specs: not valid JSON"),
        (Sources(specs="[1]"), "JSON object of sections"),
        (Sources(specs='{"train": {"lr": "fast"}}'), "train.lr = 'fast'"),
        (Sources(overrides=["train.lr=1"]), "dataset.train_ann_path is not set"),
    ],
)
def test_mistakes_are_named(sources, message):
    with pytest.raises(SpecError, match=message.replace("[", r"\[")):
        compose("train", sources)


def test_a_runtime_env_is_split_into_what_may_be_seen_and_what_not(tmp_path):
    file = tmp_path / "env.yaml"
    file.write_text("pip: [numpy]\nenv_vars: {HF_TOKEN: t, AWS_SECRET_ACCESS_KEY: s, DB_PASSWORD: p, WIDTH: 3}\n")
    environment = package.read_runtime_env(str(file))
    assert environment.public == {"pip": ["numpy"], "env_vars": {"WIDTH": "3"}}
    assert environment.secret == {"HF_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s", "DB_PASSWORD": "p"}


@pytest.mark.parametrize("text", ["working_dir: .", "[1]", "env_vars: [1]", "worker_process_setup_hook: x", "{"])
def test_a_runtime_env_that_cannot_be_used_is_refused(tmp_path, text):
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match="--runtime-env"):
        package.read_runtime_env(str(file))


def test_the_working_directory_runs_by_itself_and_hands_secrets_over(tmp_path):
    spec = load_spec(None, ["dataset.crop_size=64", "encryption_key=k3y-77"])
    package.write_working_dir(tmp_path, spec, {"MY_TOKEN": "s3cret", "HOME": "/elsewhere"})
    assert "k3y-77" not in (tmp_path / package.SPEC_FILE).read_text()
    loaded = spec_from_values(json.loads((tmp_path / package.SPEC_FILE).read_text()))
    assert loaded.dataset.crop_size == 64
    assert (tmp_path / "secrets.json").stat().st_mode & 0o077 == 0
    code = (
        "import os, mal.run.secrets as s; s.load();"
        "print(s.__file__, os.environ['MY_TOKEN'], os.environ['HOME'] != '/elsewhere')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(tmp_path / "mal" / "run" / "secrets.py"), "s3cret", "True"]


def test_addresses(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://cluster:8265/")
    assert server_address(None) == "http://cluster:8265"
    assert server_address("other:1") == "http://other:1"
    with pytest.raises(ClusterError, match="8265"):
        server_address("ray://cluster:10001")
