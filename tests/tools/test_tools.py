"""mal models, mal convert, mal export: by the commands that people type."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mal.architectures import ARCHITECTURES
from mal.cli import main
from mal.errors import CheckpointError
from mal.model.network import StudentTeacher, build_network
from mal.model.weights import load_network, read_checkpoint
from mal.spec.load import load_spec, spec_to_values
from mal.tools.convert import model_of

HEADS = ["model.mask_head_num_convs=3", "model.mask_head_hidden_channel=8", "model.mask_head_out_channel=4"]


def _pair(arch: str) -> tuple[StudentTeacher, dict[str, object]]:
    """Student and teacher that differ, and the values of their spec."""
    torch.manual_seed(0)
    spec = load_spec(None, [f"model.arch={arch}", "dataset.crop_size=32", *HEADS])
    pair = StudentTeacher(build_network(spec.model, crop_size=32))
    with torch.no_grad():
        for parameter in pair.teacher.parameters():
            parameter.mul_(1.01)
    return pair, spec_to_values(spec)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file as `mal train` writes it, reduced to what the tools read."""
    pair, values = _pair("vit-deit-tiny/16")
    path = tmp_path_factory.mktemp("checkpoint") / "trained.pth"
    torch.save({"format": "mal-training-1", "state_dict": pair.state_dict(), "spec": values, "epoch": 3}, path)
    return str(path), pair


def test_commands_load_neither_torch_nor_ray():
    code = "import sys, mal.cli; mal.cli._parser(); print({'torch', 'ray', 'timm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_models_lists_all_thirteen(capsys):
    assert main(["models", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert list(models) == list(ARCHITECTURES)
    base = models["vit-mae-base/16"]
    assert (base["stride"], base["width"]) == (16, 768)
    assert base["parameters"] == 85_798_656  # ViT-B/16 of 224 px without its classifier
    assert base["pretrained"] == "timm: vit_base_patch16_224.mae"
    assert models["vit-mae-huge/14"]["stride"] == 14
    assert models["fan_tiny_12_p16_224"]["pretrained"] is None


def test_models_of_timm_by_pattern(capsys):
    assert main(["models", "timm/vit_small*dinov3", "timm/convnext_atto", "fan_tiny*"]) == 0
    out = capsys.readouterr().out
    for name in ("timm/vit_small_patch16_dinov3", "timm/convnext_atto", "fan_tiny_8_p4_hybrid"):
        assert name in out
    assert "vit-mae" not in out
    assert main(["models", "timm/nothing*"]) == 2
    assert "no model is called timm/nothing*" in capsys.readouterr().err
    assert main(["models", "timm/*"]) == 2
    assert "narrow the pattern" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_convert_keeps_weights_and_spec(checkpoint, tmp_path, suffix, capsys):
    source, pair = checkpoint
    target = str(tmp_path / f"out.{suffix}")
    assert main(["convert", source, target]) == 0
    assert "a checkpoint of this project, vit-deit-tiny/16" in capsys.readouterr().out
    found = read_checkpoint(target)
    assert found.kind == "mal"
    for which, network in (("student", pair.student), ("teacher", pair.teacher)):
        state = found.network(which)
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert model_of(found).mask_head_hidden_channel == 8


@pytest.mark.parametrize("part", ["student", "teacher", "backbone"])
def test_convert_keeps_one_part(checkpoint, tmp_path, part):
    source, pair = checkpoint
    target = str(tmp_path / "out.safetensors")
    assert main(["convert", source, target, "--part", part]) == 0
    found = read_checkpoint(target)
    assert found.kind == ("backbone" if part == "backbone" else "network")
    expected = pair.student.backbone if part == "backbone" else getattr(pair, part)
    state = found.backbone if part == "backbone" else found.network()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


def test_convert_refuses_other_names_and_absent_parts(checkpoint, tmp_path, capsys):
    source, _ = checkpoint
    assert main(["convert", source, str(tmp_path / "out.bin")]) == 2
    assert ".safetensors or .pth" in capsys.readouterr().err
    backbone = str(tmp_path / "backbone.pth")
    assert main(["convert", source, backbone, "--part", "backbone"]) == 0
    assert main(["convert", backbone, str(tmp_path / "out.pth"), "--part", "teacher"]) == 1
    assert "holds only a backbone" in capsys.readouterr().err


def test_the_model_of_foreign_weights_is_read_from_their_shapes(tmp_path):
    pair, _ = _pair("fan_tiny_8_p4_hybrid")
    path = str(tmp_path / "peer.pth")
    torch.save({"state_dict": pair.state_dict()}, path)
    found = read_checkpoint(path)
    model = model_of(found, {"vit_dpr": 0.1})
    assert (model.arch, model.vit_dpr) == ("fan_tiny_8_p4_hybrid", 0.1)
    load_network(build_network(model), found)  # strict: raises unless the heads are right, too


def test_the_model_of_a_backbone_alone_is_refused(checkpoint, tmp_path):
    path = str(tmp_path / "backbone.pth")
    assert main(["convert", checkpoint[0], path, "--part", "backbone"]) == 0
    with pytest.raises(CheckpointError, match="only a backbone"):
        model_of(read_checkpoint(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "which"),
    [("vit-deit-tiny/16", "student"), ("fan_tiny_8_p4_hybrid", "teacher"), ("timm/convnext_atto", "student")],
)
def test_export_agrees_with_torch_for_any_batch(tmp_path, arch, which, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pair, values = _pair(arch)
    source, target = str(tmp_path / "c.pth"), str(tmp_path / "c.onnx")
    torch.save({"format": "mal-training-1", "state_dict": pair.state_dict(), "spec": values}, source)
    assert main(["export", source, target, "--network", which]) == 0
    assert "onnxruntime agrees with torch within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    images, areas = torch.randn(5, 3, 32, 32), torch.tensor([1024.0, 9216.0, 1025.0, 9217.0, 3.0])  # on the borders
    (found,) = session.run(None, {"images": images.numpy(), "areas": areas.numpy()})
    with torch.no_grad():
        expected = getattr(pair, which).eval()(images, areas)
    assert found.shape == tuple(expected.shape)
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert session.get_modelmeta().custom_metadata_map["crop_size"] == "32"


def test_export_says_what_is_wrong(checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    target = str(tmp_path / "x.onnx")
    assert main(["export", checkpoint[0], target, "--crop-size", "40"]) == 2
    assert "stride 16" in capsys.readouterr().err
    assert main(["export", checkpoint[0], target, "train.lr=1"]) == 2
    assert "model.key=value" in capsys.readouterr().err
