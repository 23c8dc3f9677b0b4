"""A training step on one worker, part by part, against the public implementation's; the mean field against unfolding.

python benchmarks/training_step.py --arch vit-deit-tiny/16 --crop-size 512 --batch 4 [--device cuda] [--clock cpu]

`PeerStep` is that implementation's step from its description: the mask head at every pixel of the enlarged map, the
mean field by unfolding, the teacher with gradients that nobody needs, float32. It runs on the same backbone, so that
only what differs by design is compared. Steps take turns: a machine that changes its speed changes it for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mal.model.losses import box_losses, dice, mil_loss
from mal.model.mean_field import fastest, refine
from mal.model.network import BAND_SCALES, StudentTeacher, band_of, build_network
from mal.spec.load import load_spec
from mal.training.step import Batch, Moment, Stepper

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "V100": 125e12}
"""Dense operations per second in 16 bits, from the makers' data sheets, by a part of the device's name."""


def unfolded(image: Tensor, probabilities: Tensor, box: Tensor, zeta: float = 0.1, iterations: int = 100) -> Tensor:
    """The mean field of METHOD section 4 to the letter: every iteration unfolds all 3 x 3 neighbourhoods."""
    b, _, h, w = image.shape

    def neighbours(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 9, H, W]
        return F.unfold(x, 3, padding=1).view(b, x.shape[1], 9, h, w)

    inside = neighbours(torch.ones(b, 1, h, w, device=image.device))
    kernel = torch.exp(-(neighbours(image) - image[:, :, None]).square().sum(1, keepdim=True) / (2 * zeta**2)) * inside
    q = (probabilities * box).clamp(0.1, 0.9)
    for _ in range(iterations):
        m0 = (kernel * neighbours(-torch.log(1 - q)[:, None])).sum(2)[:, 0]
        m1 = (kernel * neighbours(-torch.log(q)[:, None])).sum(2)[:, 0]
        a0, a1 = torch.exp(-m0), torch.exp(-m1) * box
        q = (a1 / (1e-6 + a0 + a1)).clamp(0.1, 0.9)
    return (q > 0.5).float()


class Clock:
    """Seconds by parts: of the processor (``cpu``: right on a busy machine, with one thread) or of the wall."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._device = device
        self.parts: dict[str, list[float]] = defaultdict(list)

    def run(self, part: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; its time is noted under ``part``."""
        self._wait()
        begun = self._now()
        result = work()
        self._wait()
        self.parts[part].append(self._now() - begun)
        return result

    def median(self, part: str) -> float:
        """Of all runs but the first, which warms up."""
        return statistics.median(self.parts[part][1:] or self.parts[part])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class PeerStep:
    """The public implementation's training step, from its description (REFERENCE: METHOD sections 3 and 4)."""

    def __init__(self, model: StudentTeacher, momentum: float) -> None:
        self.student, self.teacher, self.momentum = model.student, model.teacher, momentum
        self.teacher.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, betas=(0.9, 0.9), foreach=False)

    def logits(self, network: Any, images: Tensor, areas: Tensor) -> Tensor:
        features = network.features(images)
        vectors, side = network.roi_head(features), features.shape[-1]
        found = images.new_zeros(len(images), 4 * side, 4 * side)
        bands = band_of(areas)
        for band, scale in enumerate(BAND_SCALES):
            chosen = (bands == band).nonzero()[:, 0].to(images.device)
            if not len(chosen):
                continue
            x = F.interpolate(features[chosen], size=int(side * scale), mode="bilinear").contiguous()
            for place, layer in enumerate(network.mask_head.convs):
                if place == network.mask_head.upsample_before:
                    x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
                x = F.relu(layer.conv(x))
            logits = torch.einsum("bchw,bc->bhw", x, vectors[chosen])
            found = found.index_copy(0, chosen, F.interpolate(logits[:, None], found.shape[-2:], mode="bilinear")[:, 0])
        return found

    def step(self, batch: Batch) -> Tensor:
        student = self.logits(self.student, batch["image"], batch["area"]).sigmoid()
        teacher = self.logits(self.teacher, batch["teacher_image"], batch["area"]).sigmoid()
        size = tuple(student.shape[-2:])
        box = F.interpolate(batch["box_mask"][:, None].float(), size, mode="bilinear")[:, 0]
        with torch.no_grad():
            small = F.interpolate(batch["image"], size, mode="bilinear")
            target = unfolded(small, (student + teacher) / 2, box)
        loss = 4 * mil_loss(student, box).mean() + 0.5 * dice(student, target).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(self.momentum).add_(s, alpha=1 - self.momentum)
        return loss.detach()


def step_by_parts(stepper: Stepper, batch: Batch, clock: Clock, name: str) -> None:
    """`Stepper.step`, with the device waited for after each part (so its sum is a little above the step's time)."""
    images, areas = batch["image"], batch["area"]
    cast = torch.autocast(stepper.device.type, stepper.compute, enabled=stepper.compute != torch.float32)
    with cast:
        student = clock.run(f"{name}: student forward", lambda: stepper.strategy.student(images, areas))
        teacher = clock.run(f"{name}: teacher", lambda: stepper.strategy.teacher(batch["teacher_image"], areas))
    losses = clock.run(
        f"{name}: mean field and losses",
        lambda: box_losses(student, teacher, images, batch["box_mask"], crf=stepper.crf),
    )
    clock.run(f"{name}: backward", losses.total.backward)

    def update() -> None:
        stepper.optimizer.step()
        stepper.optimizer.zero_grad(set_to_none=True)
        stepper.model.update_teacher(stepper.spec.model.teacher_momentum)

    clock.run(f"{name}: optimiser and teacher update", update)


def make_batch(size: int, crop: int, device: torch.device) -> Batch:
    """Random crops: one small box, one medium, the rest large, as in COCO's mix of trained boxes."""
    box_mask = torch.zeros(size, crop, crop, device=device)
    box_mask[:, crop // 8 : -crop // 8, crop // 8 : -crop // 8] = 1.0
    areas = torch.tensor([900.0, 5000.0, *[40000.0] * size][:size], dtype=torch.float64)
    images = torch.randn(size, 3, crop, crop, device=device)
    return {"image": images, "teacher_image": images.clone(), "box_mask": box_mask, "area": areas}


def make_stepper(options: argparse.Namespace, device: torch.device, amp: bool) -> Stepper:
    spec = load_spec(
        None,
        [
            f"model.arch={options.arch}",
            f"dataset.crop_size={options.crop_size}",
            f"train.batch_size={options.batch}",
            f"train.use_amp={amp}",
        ],
    )
    return Stepper(
        spec, StudentTeacher(build_network(spec.model, crop_size=options.crop_size)).to(device), device, workers=1
    )


def time_steps(options: argparse.Namespace, device: torch.device) -> None:
    """Prints the seconds of the steps, what is between them, and the share of each part."""
    steppers = {"float32": make_stepper(options, device, amp=False)}
    mixed = make_stepper(options, device, amp=True)
    if mixed.compute != torch.float32:
        steppers[str(mixed.compute).removeprefix("torch.")] = mixed
    else:
        print("  this CPU has no bfloat16 instructions: float32 only")
    model = StudentTeacher(build_network(steppers["float32"].spec.model, crop_size=options.crop_size)).to(device)
    peer = PeerStep(model, momentum=0.996)
    batch, clock = make_batch(options.batch, options.crop_size, device), Clock(options.clock, device)
    for _ in range(options.repeats + 1):
        clock.run("peer", lambda: peer.step(batch))
        for name, stepper in steppers.items():
            clock.run(name, lambda s=stepper: s.step([batch], Moment(1, 0, 10)))
            step_by_parts(stepper, batch, clock, name)
    print(f"  the public implementation's step, float32: {clock.median('peer'):7.3f} s")
    for name in steppers:
        seconds = clock.median(name)
        print(f"  step, {name}: {seconds:.3f} s, {options.batch / seconds:.2f} boxes/s: ", end="")
        print(f"{clock.median('peer') / seconds:.2f} times faster")
        parts = {part: clock.median(part) for part in clock.parts if part.startswith(f"{name}: ")}
        for part, value in parts.items():
            print(f"    {part.removeprefix(f'{name}: '):28} {100 * value / sum(parts.values()):5.1f} %")
    if device.type == "cuda":
        peak = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name(device)), None)
        work = operations(steppers["float32"], batch)
        for name in steppers:
            rate = work / clock.median(name)
            share = f", MFU {100 * rate / peak:.1f} %" if peak and name != "float32" else ""
            print(f"  {name}: {rate / 1e12:.1f} TFLOP/s{share}")


def operations(stepper: Stepper, batch: Batch) -> float:
    """Floating-point operations of a step's matrix products and convolutions, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        stepper.step([batch], Moment(1, 0, 10))
    return float(counter.get_total_flops())


def time_mean_field(options: argparse.Namespace, device: torch.device) -> None:
    """Prints the mean field's milliseconds by unfolding and by the way that is taken on this device."""
    side, clock = options.crop_size // 4, Clock(options.clock, device)
    image = F.interpolate(torch.rand(options.batch, 3, 12, 12), (side, side), mode="bicubic").mul(4).to(device)
    q = torch.rand(options.batch, side, side, device=device)
    box = torch.ones_like(q)
    for _ in range(options.repeats + 1):
        slow = clock.run("unfolded", lambda: unfolded(image, q, box))
        fast = clock.run("here", lambda: refine(image, q, box))
    seconds, quick = clock.median("unfolded"), clock.median("here")
    print(f"  mean field, {options.batch} x {side} x {side}, by {fastest(device.type).__name__}: ", end="")
    print(f"unfolded {1e3 * seconds:.1f} ms, here {1e3 * quick:.2f} ms: {seconds / quick:.1f} times faster, ", end="")
    print(f"{int((slow != fast).sum())} of {q.numel()} pixels differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit-deit-tiny/16")
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for busy machines, --threads 1")
    parser.add_argument("--only", choices=("step", "mean-field"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    print(f"{options.arch}, crop {options.crop_size}, batch {options.batch}, {options.threads} threads, {device}")
    if options.only != "mean-field":
        time_steps(options, device)
    if options.only != "step":
        time_mean_field(options, device)


if __name__ == "__main__":
    main()
