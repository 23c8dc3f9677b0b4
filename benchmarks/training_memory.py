"""Bytes that every training worker holds, DDP beside FSDP2: parameters, gradients, optimiser state, teacher.

python benchmarks/training_memory.py --arch vit-mae-huge/14 --workers 1 2 4
python benchmarks/training_memory.py --measure 2     # a small model on real workers: what it holds, against the count

The count is made of the real model, wrapped as training wraps it, on the meta device and as the first of so many
workers that do not exist (torch's fake process group): the shards have their real shapes, but no memory. Not in it:
activations, and the one block (and its gradients) that FSDP holds in full for a moment.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec
from mal.spec.schema import Spec
from mal.training.recompute import transformer_blocks
from mal.training.step import Batch, Moment, Stepper
from mal.training.strategy import Alone, spread

KINDS = ("parameters", "gradients", "optimiser", "teacher")
CPU = torch.device("cpu")
CROP = {"vit-mae-huge/14": 224}


def local(tensor: Tensor) -> Tensor:
    """What this worker has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the shards of this worker."""
    return sum(local(t).numel() * local(t).element_size() for t in tensors)


def make_spec(arch: str, strategy: str) -> Spec:
    crop = CROP.get(arch, 64)
    small = [f"dataset.crop_size={crop}", "train.batch_size=1", "train.use_amp=false", "train.crf_num_iter=2"]
    return load_spec(None, [f"model.arch={arch}", f"strategy={strategy}", *small])


def counted(strategy: Alone) -> dict[str, int]:
    """From the shapes of the shards: AdamW keeps two tensors like each parameter, and a number."""
    student = [p for p in strategy.model.student.parameters() if p.requires_grad]
    return {
        "parameters": size(strategy.model.student.parameters()),
        "gradients": size(student),
        "optimiser": 2 * size(student) + 4 * len(student),
        "teacher": size(strategy.model.teacher.parameters()),
    }


def count(arch: str, strategy: str, workers: int) -> tuple[dict[str, int], int]:
    """`counted` for the first of ``workers``, and the bytes of the largest block in full."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workers)
    spec = make_spec(arch, strategy)
    with torch.device("meta"):
        model = StudentTeacher(build_network(spec.model, crop_size=spec.dataset.crop_size))
    model.to = lambda *_: model  # type: ignore[method-assign,assignment] # meta tensors cannot be moved
    block = max(sum(p.numel() * 4 for p in b.parameters()) for b in transformer_blocks(model.student))
    # DDP keeps the model as it is on one worker.
    found = counted(spread(model, spec, CPU, torch.float32) if strategy == "fsdp" else Alone(model, CPU))
    dist.destroy_process_group()
    return found, block


def measure(rank: int, workers: int, arch: str, strategy: str, port: int) -> None:
    """One real worker: a step, then the bytes of the storages that it holds, and the process's growth."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    spec = make_spec(arch, strategy)
    model = StudentTeacher(build_network(spec.model, crop_size=spec.dataset.crop_size))
    stepper = Stepper(spec, model, torch.device("cpu"), workers)
    gradients = 0

    def look(*_: object) -> None:
        nonlocal gradients
        gradients = storages(p.grad for p in stepper.model.student.parameters() if p.grad is not None)

    stepper.optimizer.register_step_pre_hook(look)
    stepper.step([random_batch(spec)], Moment(1, 0, 10))
    state = stepper.optimizer.state
    held = {
        "parameters": storages(stepper.model.student.parameters()),
        "gradients": gradients,
        "optimiser": storages(value for slots in state.values() for value in slots.values()),
        "teacher": storages(stepper.model.teacher.parameters()),
    }
    if rank == 0:
        show(f"  {strategy}, {workers} workers, counted ", counted(stepper.strategy))
        show(f"  {strategy}, {workers} workers, measured", held)
    dist.destroy_process_group()


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage once."""
    found = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def random_batch(spec: Spec) -> Batch:
    side = spec.dataset.crop_size
    images = torch.randn(1, 3, side, side)
    area = torch.tensor([40000.0], dtype=torch.float64)
    return {"image": images, "teacher_image": images, "box_mask": torch.ones(1, side, side), "area": area}


def show(what: str, found: dict[str, int]) -> None:
    figures = "  ".join(f"{kind} {found[kind] / 2**20:8.1f}" for kind in KINDS)
    print(f"{what}  {figures}  together {sum(found.values()) / 2**20:8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit-mae-huge/14")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--measure", type=int, metavar="N", help="instead: vit-deit-tiny/16 on N real workers")
    options = parser.parse_args()
    if options.measure:
        print(f"vit-deit-tiny/16 on {options.measure} gloo workers, the first one's memory after a step")
        for strategy in ("ddp", "fsdp"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            arguments = (options.measure, "vit-deit-tiny/16", strategy, port)
            mp.start_processes(measure, arguments, nprocs=options.measure, start_method="forkserver")
        return
    print(f"{options.arch}, float32, per worker")
    for workers in options.workers:
        for strategy in ("ddp", "fsdp") if workers > 1 else ("ddp",):
            found, block = count(options.arch, strategy, workers)
            show(f"  {strategy:4} {workers:2} workers", found)
    print(f"  FSDP holds one block more in full: {block / 2**20:.1f} MiB, and as much of gradients")


if __name__ == "__main__":
    main()
