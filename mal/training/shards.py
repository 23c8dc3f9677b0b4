"""Sharded checkpoints: a folder to which every worker writes its part, by ``torch.distributed.checkpoint``.

The folder holds torch's own files (``__0_0.distcp`` ..., ``.metadata``) and, written last, `FACTS`: what is not a
tensor, and the sizes of the files. A folder without it is half a checkpoint. Any number of workers reads it, each what
it needs.
Files go through `mal.storage` and, with a key, through `mal.encryption`. Reading runs no code: torch's own reader
unpickles whatever ``.metadata`` holds, this one only the few classes that belong there.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mal import storage
from mal.encryption import opened, sealed
from mal.errors import CheckpointError, MalError
from mal.model.safe_loading import load_pickle

# What one worker does alone is no accident. Set for good: `warnings.catch_warnings` is not for threads, and they save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FACTS = "training.pth"
"""The file that is written last: epoch, offset, spec and the like."""

_CLASSES = {
    "torch.distributed.checkpoint.metadata": [
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))],
}


def write_shards(
    folder: str, state: Mapping[str, Tensor], facts: Mapping[str, Any], key: str | None, group: Any, rank: int
) -> None:
    """Write ``state`` (shards under FSDP) and ``facts``; a call of all ranks of ``group`` (None: there is one worker).

    Raises:
        StorageError: on every rank, if any of them could not write. What was written is deleted.
    """
    if rank == 0:
        storage.delete(folder)  # of an attempt that came as far but did not finish
    if group is not None:
        dist.barrier(group)
    try:
        dcp.save(dict(state), storage_writer=_Writer(folder, key), process_group=group, no_dist=group is None)
        if rank == 0:
            content = {**facts, "files": {name: _size(folder, name) for name in storage.list_files(folder)}}
            with storage.open_write(storage.join(folder, FACTS)) as file, sealed(file, key) as clear:
                torch.save(content, clear)
    except (CheckpointException, MalError) as error:
        if rank == 0:
            with contextlib.suppress(MalError):  # the first error is the one to be shown
                storage.delete(folder)
        _explain(folder, error)


def read_facts(folder: str, key: str | None) -> dict[str, Any]:
    """What is not a tensor; None of the tensors is read, but their files must be there in full.

    Raises:
        CheckpointError: it is no complete checkpoint, or the key is wrong.
    """
    if not storage.exists(storage.join(folder, FACTS)):
        raise CheckpointError(f"{folder}: it is half a checkpoint: writing it was stopped")
    facts = load_pickle(storage.join(folder, FACTS), key)
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        raise CheckpointError(f"{folder}: {FACTS} is not that of a sharded checkpoint")
    there = set(storage.list_files(folder))
    for name, size in facts["files"].items():
        if name not in there or _size(folder, name) != size:
            raise CheckpointError(f"{folder}: {name} is missing or was cut; use another checkpoint")
    return facts


def load_shards(folder: str, state: dict[str, Tensor], key: str | None, group: Any) -> None:
    """Fill the tensors of ``state`` in place, each rank its shards; a call of all ranks of ``group`` (None: this one).

    Raises:
        CheckpointError: on every rank, if any of them could not read its part.
    """
    try:
        reader, planner = _Reader(folder, key), _TensorsOnly()
        dcp.load(state, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        _explain(folder, error)


def read_whole(folder: str, key: str | None) -> dict[str, Tensor]:
    """All tensors, in full, without the help of other ranks."""
    wanted = _Reader(folder, key).read_metadata().state_dict_metadata
    tensors = {name: item for name, item in wanted.items() if isinstance(item, TensorStorageMetadata)}
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in tensors.items()}
    load_shards(folder, state, key, None)
    return state


def _size(folder: str, name: str) -> int:
    return storage.size(storage.join(folder, name))


def _explain(folder: str, error: BaseException) -> NoReturn:
    """Raise the MalError that is behind ``error``, or a CheckpointError with the first cause."""
    if isinstance(error, MalError):
        raise error
    assert isinstance(error, CheckpointException)
    causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, MalError):
            raise cause from error
    reason = f"{type(causes[0]).__name__}: {causes[0]}"
    raise CheckpointError(f"{folder}: the sharded checkpoint cannot be read or written ({reason})") from error


class _Files(FileSystemBase):
    """What torch asks of a file system, by `mal.storage`, encrypted if there is a key."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode == "wb":
            with storage.open_write(path) as file, sealed(file, self._key) as clear:
                yield _LeftOpen(clear)
        else:
            yield io.BytesIO(opened(storage.read_bytes(path), self._key, path))

    def concat_path(self, path: Any, suffix: str) -> str:
        return storage.join(path, suffix)

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        storage.copy(path, new_path)
        storage.delete(path)

    def mkdir(self, path: Any) -> None:
        storage.make_folder(path)

    def exists(self, path: Any) -> bool:
        return storage.exists(path)

    def rm_file(self, path: Any) -> None:
        storage.delete(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _LeftOpen(io.RawIOBase):
    """A file that torch may close as often as it likes: who opened it brings it to the disk and closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


class _Writer(FileSystemWriter):
    def __init__(self, folder: str, key: str | None) -> None:
        super().__init__(".", sync_files=False)  # `mal.storage` brings files to the disk
        self.fs, self.path = _Files(key), folder  # type: ignore[assignment]


class _Reader(FileSystemReader):
    def __init__(self, folder: str, key: str | None) -> None:
        super().__init__(".")
        self.fs, self.path = _Files(key), folder  # type: ignore[assignment]

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = storage.join(str(self.path), ".metadata")
        with self.fs.create_stream(path, "rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{path}: it is broken, or would run code, and was not loaded: {error}"
                ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: it is not that of a sharded checkpoint")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Torch's planner would unpickle here whatever it is given; our checkpoints have tensors only."""
        raise CheckpointError(f"{read_item.dest_index.fqn}: it is not a tensor, and was not loaded")
