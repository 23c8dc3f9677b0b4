"""How the model is spread over the workers: copied to each (DDP) or sharded over them (FSDP2).

Both give and take tensors by the same names, so a checkpoint of one resumes under the other and on any number of
workers: ``model.<name>`` for student and teacher, ``optimizer.<parameter of the student>.<slot>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from mal.spec.schema import Spec
from mal.training.recompute import recompute_in_backward, transformer_blocks

MODEL, OPTIMIZER = "model.", "optimizer."


class Alone:
    """One worker: nothing to spread."""

    sharded = False
    """Whether a rank holds only its part of the tensors."""

    def __init__(self, model: StudentTeacher, device: torch.device) -> None:
        self.model = model.to(device)
        self.workers = dist.get_world_size() if dist.is_initialized() else 1

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

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside, every worker can run the student by itself, forward only. Entered by all ranks together."""
        return nullcontext()

    def share_buffers(self) -> None:
        """Give every worker the first one's buffers (statistics of batch norms). A call of all ranks together."""
        floats = [buffer for buffer in self.model.student.buffers() if buffer.is_floating_point()]
        if not floats or self.workers == 1:
            return
        together = torch.cat([buffer.flatten() for buffer in floats])
        dist.broadcast(together, src=0)
        for buffer, part in zip(floats, together.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """All tensors of model and optimiser, not copied: in full, or this rank's shards as DTensors.

        A call of all ranks together.
        """
        found = {MODEL + name: tensor for name, tensor in get_model_state_dict(self.model).items()}
        slots = get_optimizer_state_dict(self.model.student, optimizer)["state"]
        for name, values in cast(dict[str, dict[str, Tensor]], slots).items():
            found |= {f"{OPTIMIZER}{name}.{slot}": tensor for slot, tensor in values.items()}
        return cast(dict[str, Tensor], found)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        """Take over the optimiser's tensors as `state` gives them; its hyperparameters stay those of the spec."""
        groups = get_optimizer_state_dict(self.model.student, optimizer)["param_groups"]
        own = {"state": optimizer_slots(state), "param_groups": groups}
        set_optimizer_state_dict(self.model.student, optimizer, cast(Any, own))

    def load_full(
        self, optimizer: torch.optim.Optimizer, model: Mapping[str, Any], optimizer_state: Mapping[str, Any]
    ) -> None:
        """Take over full tensors that the first rank has read; the others give empty dicts.

        A call of all ranks together; they get one tensor after another, and keep their shard of it.
        """
        spread_out = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.workers > 1)
        set_model_state_dict(self.model, dict(model), options=spread_out)
        kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        set_optimizer_state_dict(self.model.student, optimizer, dict(optimizer_state), options=spread_out)
        for group, own in zip(optimizer.param_groups, kept, strict=True):
            group.update(own)  # the hyperparameters are the spec's of now


def optimizer_slots(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors of `Alone.state` as torch nests them: by parameter, then by slot."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(OPTIMIZER):
            parameter, _, slot = name.removeprefix(OPTIMIZER).rpartition(".")
            found.setdefault(parameter, {})[slot] = tensor
    return found


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

    sharded = True

    def __init__(self, model: StudentTeacher, device: torch.device, compute: torch.dtype, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        super().__init__(model, torch.device("cpu") if offload else device)
        for buffer in model.buffers():
            buffer.data = buffer.to(device)  # only parameters are offloaded
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        for network in (self.model.student, self.model.teacher):
            for block in transformer_blocks(network):
                fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place)
            # A network that only runs forward is not sharded again by a backward pass: the EMA needs it sharded.
            again = network is self.model.teacher
            fully_shard(network, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=again)

    def local_gradients(self) -> AbstractContextManager[Any]:
        return _unsynced(self.model.student)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All of the student's parameters on every worker, so that no forward pass waits for the others."""
        from torch.distributed.fsdp import FSDPModule

        student = self.model.student
        units = [module for module in student.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not student, recurse=False)
                unit.reshard()


class _unsynced:  # noqa: N801 - a context manager, used like a function
    def __init__(self, student: nn.Module) -> None:
        self._student: Any = student

    def __enter__(self) -> None:
        self._student.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._student.set_requires_gradient_sync(True)


def spread(model: StudentTeacher, spec: Spec, device: torch.device, compute: torch.dtype) -> Alone:
    """The strategy of the spec for the process group at hand; one worker alone needs none.

    Raises:
        SpecError: activation checkpointing is asked for, and the backbone has no blocks.
    """
    if spec.train.activation_checkpointing:
        recompute_in_backward(model.student)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone(model, device)
    return Fsdp(model, device, compute, spec.train.cpu_offload) if spec.strategy == "fsdp" else Ddp(model, device)
