"""Files of weights are never run."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mal.errors import CheckpointError, StorageError
from mal.model.safe_loading import load_content, load_pickle


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, target: pathlib.Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return eval, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_named_and_not_run(tmp_path: pathlib.Path, new_format: bool) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "pwned"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "x": Attack(target)}, path, _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(
        CheckpointError, match=r"evil\.pth: loading it could run code, as it holds .*eval.*weights_only"
    ):
        load_pickle(str(path))
    assert not target.exists()


def test_bare_pickle_is_not_run(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "pwned"
    with pytest.raises(CheckpointError, match="evil"):
        load_content(pickle.dumps(Attack(target), protocol=2), "evil")
    assert not target.exists()


def test_harmless_leftovers_are_let_through_as_nothing() -> None:
    content = {
        "state_dict": {"a": torch.ones(2)},
        "args": argparse.Namespace(lr=1.0),
        "score": np.float64(0.5),
        "curve": np.arange(3),
        "folder": pathlib.PurePosixPath("x").__class__ and pathlib.Path("x"),
        "epoch": 3,
    }
    values = load_content(saved(content), "x").values
    assert values["epoch"] == 3
    assert values["state_dict"]["a"].tolist() == [1.0, 1.0]
    assert not hasattr(values["args"], "lr")


class Stranger:
    """A class that no allow-list knows."""


def test_an_unknown_class_is_named_with_the_conversion(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "odd.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "trainer": Stranger()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_pickle(str(path))
    assert "test_safe_loading.Stranger; it was not loaded" in str(caught.value)
    assert 'torch.save({"state_dict": content["state_dict"]}, "safe.pth")' in str(caught.value)
    content = torch.load(path, weights_only=False)  # what the message says, by who trusts the file
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "safe.pth")
    assert load_pickle(str(tmp_path / "safe.pth"))["state_dict"]["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "bool", "U3", "datetime64[s]"])
def test_numpy_leftovers_of_any_type(dtype: str) -> None:
    array = np.zeros(3, dtype)
    content = {"state_dict": {"a": torch.ones(2)}, "array": array, "scalar": array[0], "type": array.dtype}
    assert load_content(saved(content), "x").values["state_dict"]["a"].tolist() == [1.0, 1.0]


def test_safetensors_with_metadata() -> None:
    data = safetensors.torch.save({"a": torch.ones(2)}, metadata={"arch": "x"})
    content = load_content(data, "x")
    assert content.values["a"].tolist() == [1.0, 1.0]
    assert content.metadata == {"arch": "x"}


@pytest.mark.parametrize("make", [saved, safetensors.torch.save])
def test_truncated(make: Any) -> None:
    data = make({"a": torch.ones(1000)})
    for end in (0, 1, 7, 20, len(data) // 2, len(data) - 3):
        with pytest.raises(CheckpointError, match="broken"):
            load_content(data[:end], "half.pth")


@pytest.mark.parametrize(
    "data", [b"", b"PNG not a checkpoint", b"{}", b"\x80\x02.", bytes(100), b"\xff\xd8\xff\xe0JFIF"]
)
def test_other_files(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"photo\.jpg"):
        load_content(data, "photo.jpg")


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        load_pickle(str(tmp_path / "none.pth"))
