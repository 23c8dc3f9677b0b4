"""Files of weights to plain objects, without ever running what is in them.

PyTorch files are pickles, and a pickle can run any code. They are read with ``weights_only=True``: tensors, containers
and numbers, nothing else. Leftovers that training scripts are known to store beside the weights (command-line options,
numpy scalars, configurations) are let through as `Leftover`, an empty object: their own code is not run either.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mal import storage
from mal.encryption import opened
from mal.errors import CheckpointError


class Leftover:
    """Stands in for an object of another program; holds nothing of it."""

    def __new__(cls, *_: object) -> Leftover:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_LEFTOVERS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Int64DType",
    "numpy.ndarray",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib.PureWindowsPath",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.torch_version.TorchVersion",
    "types.SimpleNamespace",
    "typing.Any",
    "builtins.bytes",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
)
"""Classes and functions whose results are data that nobody needs for the weights."""

_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
)
"""Kinds of dict; their items are kept."""


def _plain_dict(*_: object) -> OrderedDict[Any, Any]:
    """In place of a ``defaultdict``, whose factory is not wanted."""
    return OrderedDict()


_STAND_INS: list[Any] = [
    *((Leftover, name) for name in _LEFTOVERS),
    *((OrderedDict, name) for name in _DICTS),
    (_plain_dict, "collections.defaultdict"),
]

_CONVERSION = (
    "If you trust where it comes from, rewrite it once with the program that made it: content = torch.load(path, "
    'map_location="cpu", weights_only=False); torch.save({"state_dict": content["state_dict"]}, "safe.pth")'
)

_GLOBAL = re.compile(r"GLOBAL (\S+?) (?:was not|whose)|(?:unrecognized function|add_safe_globals` but got) (.+)")


class Content(NamedTuple):
    """What a file holds."""

    values: Any
    """As it was saved: usually a dict, perhaps nested."""
    metadata: dict[str, str]
    """Of a safetensors file; empty otherwise."""


def load_content(data: bytes, name: str) -> Content:
    """The content of a PyTorch or safetensors file; which one is seen from its first bytes.

    Args:
        name: of the file, for messages.

    Raises:
        CheckpointError: it is broken, neither of the two, or would run code.
    """
    if _looks_like_safetensors(data):
        return _load_safetensors(data, name)
    return Content(_unpickle(data, name), {})


def load_pickle(path: str, key: str | None = None) -> Any:
    """The object that ``torch.save`` wrote to ``path``, tensors on the CPU.

    Raises:
        StorageError: the file cannot be read.
        CheckpointError: it is broken, not a PyTorch file, or would run code.
    """
    return _unpickle(opened(storage.read_bytes(path), key, path), path)


def _looks_like_safetensors(data: bytes) -> bool:
    return len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 100_000_000


def _load_safetensors(data: bytes, name: str) -> Content:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{name}: the safetensors file is broken ({error}); fetch it again") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Content(tensors, dict(header.get("__metadata__", {})))


def _unpickle(data: bytes, name: str) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe_names(data, str(error))
        if unsafe:
            raise CheckpointError(
                f"{name}: loading it could run code, as it holds {', '.join(unsafe)}; it was not loaded. {_CONVERSION}"
            ) from error
        raise CheckpointError(f"{name}: this is not a file of weights, or it is broken; fetch it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        # What torch raises for truncated and for foreign files depends on where it stumbles.
        raise CheckpointError(
            f"{name}: this is not a PyTorch or safetensors file, or it is broken ({len(data)} bytes); fetch it again"
        ) from error


def _unsafe_names(data: bytes, message: str) -> list[str]:
    """Names of what the pickle wants to call and may not; empty if that is not why it failed."""
    found = _GLOBAL.search(message)
    if not found:
        return []
    names = {found.group(1) or found.group(2).splitlines()[0].rstrip(".")}
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError):
        pass  # files of the old format cannot be listed; the first name, from the message, must do
    return sorted(names)
