"""How the model is spread over the workers: copied to each (DDP) or sharded over them (FSDP2).

Both give and take the same full state dicts, so a checkpoint of one resumes under the other and on any number of
workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from mal.model.network import StudentTeacher

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Alone:
    """One worker: nothing to spread."""

    def __init__(self, model: StudentTeacher, device: torch.device) -> None:
        self.model = model.to(device)

    def student(self, images: Tensor, areas: Tensor) -> Tensor:
        """Logits of the student, with gradients that are summed over the workers by `backward`."""
        return self.model.student(images, areas)

    def teacher(self, images: Tensor, areas: Tensor) -> Tensor:
        """Logits of the teacher, without gradients."""
        with torch.no_grad():
            return self.model.teacher(images, areas)

    def local_gradients(self) -> AbstractContextManager[Any]:
        """Inside, gradients stay on their worker: for all but the last batch of an accumulation."""
        return nullcontext()

    def model_state(self) -> dict[str, Tensor]:
        """The full state dict on the CPU; empty on all ranks but the first. A call of all ranks together."""
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=_FULL))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The full state of the student's optimiser, likewise; keyed by parameter names."""
        return get_optimizer_state_dict(self.model.student, optimizer, options=_FULL)

    def load_model(self, state: Mapping[str, Any]) -> None:
        """Take over a full state dict that every rank has read. A call of all ranks together."""
        set_model_state_dict(self.model, dict(state), options=_FULL)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take over a full optimiser state."""
        set_optimizer_state_dict(self.model.student, optimizer, dict(state), options=_FULL)


class Ddp(Alone):
    """Every worker has the whole model; gradients are averaged while they are computed."""

    def __init__(self, model: StudentTeacher, device: torch.device) -> None:
        super().__init__(model, device)
        self._wrapped = DistributedDataParallel(
            self.model.student,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def student(self, images: Tensor, areas: Tensor) -> Tensor:
        return self._wrapped(images, areas)

    def local_gradients(self) -> AbstractContextManager[Any]:
        return self._wrapped.no_sync()


class Fsdp(Alone):
    """Parameters, gradients and optimiser state are sharded over the workers, per block, the teacher's alike."""

    def __init__(self, model: StudentTeacher, device: torch.device, compute: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(model, device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for network in (self.model.student, self.model.teacher):
            for block in _blocks(network):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            # A network that only runs forward is not sharded again by a backward pass: the EMA needs it sharded.
            fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=network is self.model.teacher)

    def local_gradients(self) -> AbstractContextManager[Any]:
        return _unsynced(self.model.student)


class _unsynced:  # noqa: N801 - a context manager, used like a function
    def __init__(self, student: nn.Module) -> None:
        self._student: Any = student

    def __enter__(self) -> None:
        self._student.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._student.set_requires_gradient_sync(True)


def spread(model: StudentTeacher, strategy: str, device: torch.device, compute: torch.dtype) -> Alone:
    """The strategy of the spec for the process group at hand; one worker alone needs none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone(model, device)
    return Fsdp(model, device, compute) if strategy == "fsdp" else Ddp(model, device)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a backbone, in order."""
    found = [m for name, m in network.named_modules() if name.rpartition(".")[0].endswith("blocks")]
    return found
