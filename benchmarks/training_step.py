"""A training step on one worker: its seconds in float32 and in mixed precision, and the mean field against unfolding.

python benchmarks/training_step.py --arch vit-deit-tiny/16 --crop-size 512 --batch 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mal.model.mean_field import refine
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec
from mal.training.step import Batch, Moment, Stepper


def unfolded(image: Tensor, probabilities: Tensor, box: Tensor, zeta: float = 0.1, iterations: int = 100) -> Tensor:
    """The mean field of METHOD section 4 to the letter: every iteration unfolds all 3 x 3 neighbourhoods."""
    b, _, h, w = image.shape

    def neighbours(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 9, H, W]
        return F.unfold(x, 3, padding=1).view(b, x.shape[1], 9, h, w)

    inside = neighbours(torch.ones(b, 1, h, w))
    kernel = torch.exp(-(neighbours(image) - image[:, :, None]).square().sum(1, keepdim=True) / (2 * zeta**2)) * inside
    q = (probabilities * box).clamp(0.1, 0.9)
    for _ in range(iterations):
        m0 = (kernel * neighbours(-torch.log(1 - q)[:, None])).sum(2)[:, 0]
        m1 = (kernel * neighbours(-torch.log(q)[:, None])).sum(2)[:, 0]
        a0, a1 = torch.exp(-m0), torch.exp(-m1) * box
        q = (a1 / (1e-6 + a0 + a1)).clamp(0.1, 0.9)
    return (q > 0.5).float()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def make_batch(size: int, crop: int) -> Batch:
    """Random crops: one small box, one medium, the rest large, as in COCO's mix of trained boxes."""
    box_mask = torch.zeros(size, crop, crop)
    box_mask[:, crop // 8 : -crop // 8, crop // 8 : -crop // 8] = 1.0
    areas = torch.tensor([900.0, 5000.0, *[40000.0] * size][:size], dtype=torch.float64)
    images = torch.randn(size, 3, crop, crop)
    return {"image": images, "teacher_image": images.clone(), "box_mask": box_mask, "area": areas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit-deit-tiny/16")
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.arch}, crop {options.crop_size}, batch {options.batch}, {options.threads} threads")
    steps = {}
    for amp in (False, True):
        spec = load_spec(
            None,
            [
                f"model.arch={options.arch}",
                f"dataset.crop_size={options.crop_size}",
                f"train.batch_size={options.batch}",
                f"train.use_amp={amp}",
            ],
        )
        model = StudentTeacher(build_network(spec.model, crop_size=options.crop_size))
        stepper = Stepper(spec, model, torch.device("cpu"), 1)
        batch = make_batch(options.batch, options.crop_size)
        steps[amp] = median_seconds(lambda s=stepper, b=batch: s.step([b], Moment(1, 0, 10)), options.repeats)  # type: ignore[misc]
        print(f"  step, {str(stepper.compute).removeprefix('torch.'):9} {steps[amp]:7.2f} s")
    print(f"  float32 / mixed precision {steps[False] / steps[True]:.1f}")
    side = options.crop_size // 4
    image, q = torch.randn(options.batch, 3, side, side), torch.rand(options.batch, side, side)
    box = torch.ones(options.batch, side, side)
    slow = median_seconds(lambda: unfolded(image, q, box), options.repeats)
    fast = median_seconds(lambda: refine(image, q, box), options.repeats)
    same = (unfolded(image, q, box) == refine(image, q, box)).float().mean().item()
    print(f"  mean field, {options.batch} x {side} x {side}: unfolded {1e3 * slow:.0f} ms, here {1e3 * fast:.0f} ms,")
    print(f"  {slow / fast:.1f} times faster, {100 * same:.3f} % of pixels equal")


if __name__ == "__main__":
    main()
