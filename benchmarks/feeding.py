"""Whether the loader keeps up with the step: samples/s of each, how many loader processes it takes, the waiting share.

python benchmarks/feeding.py COCO_JSON IMAGE_FOLDER --arch vit-deit-tiny/16 --crop-size 512 --batch 4 --processes 2

The loader's cost is also given part by part. `--clock cpu` counts the processor's seconds, right on a busy machine; the
waiting share is measured on the wall's clock, with `--processes` of them beside `--steps` steps.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from mal import boxes, crops
from mal.data import augment
from mal.data.index import build_index
from mal.data.sampler import OffsetSampler, epoch_order
from mal.data.training_set import TrainingSet, load_training_boxes
from mal.model.network import StudentTeacher, build_network
from mal.resizing import resize
from mal.spec.load import load_spec
from mal.training.step import Moment, Stepper
from mal.training.waiting import Waiting

Clock = Callable[[], float]

MOST_WAITING = 0.05
"""The aim: the step waits for less than this part of its time."""


def loader_seconds(data: TrainingSet, samples: int, now: Clock) -> dict[str, float]:
    """Seconds per sample of one process, by parts; ``all`` is the whole of it."""
    order = epoch_order(len(data), seed=0, epoch=0)[: samples + 1]
    data[(0, int(order[0]))]  # warms up
    begun = now()
    for index in order[1:]:
        data[(0, int(index))]
    spent = {"all": (now() - begun) / samples, "read and decode": 0.0, "cut and resize": 0.0}
    for index in order[1:]:
        begun = now()
        place, image = data._readable(int(index))
        decoded = now()
        box = boxes.Box(*(float(v) for v in data._boxes.corners[place]))
        window = boxes.train_window(box, data._margin_rate, augment.sample_generator(0, 0, int(index)))
        resize(crops.cut(image, window), data._crop_size)
        spent["read and decode"] += (decoded - begun) / samples
        spent["cut and resize"] += (now() - decoded) / samples
    return spent


@dataclass(frozen=True)
class Stepped:
    """What was measured of steps fed by a loader; seconds."""

    step: float
    changing: float
    """Of a step, the student's view: colours and blur, on the device."""
    waiting: float
    """Part of the time in which the next batch was waited for."""


def fed_steps(data: TrainingSet, stepper: Stepper, batch: int, processes: int, steps: int, now: Clock) -> Stepped:
    """``steps`` steps after one that warms up, on batches of a loader of ``processes``."""
    device = stepper.device
    sampler = OffsetSampler(len(data), batch_size=batch, rank=0, workers=1, seed=0)
    loader = DataLoader(
        data,
        batch_size=batch,
        sampler=sampler,
        num_workers=processes,
        multiprocessing_context="forkserver" if processes else None,
        prefetch_factor=4 if processes else None,
        pin_memory=device.type == "cuda",
    )
    waiting, seconds, changing = Waiting(device), [], []
    since = waiting.mark()
    for number, samples in enumerate(waiting.over(loader)):
        if number == 1:
            since = waiting.mark()  # the first batch waits for the processes to start, the first step warms up
        begun = now()
        views = augment.views(samples, device)
        _finish(device)
        changing.append(now() - begun)
        stepper.step([views], Moment(1, 0, 10))
        _finish(device)
        seconds.append(now() - begun)
        if number == steps:
            break
    return Stepped(float(np.median(seconds[1:])), float(np.median(changing)), waiting.share(since))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("annotations")
    parser.add_argument("images")
    parser.add_argument("--arch", default="vit-deit-tiny/16")
    parser.add_argument("--crop-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100, help="that the loader alone is timed on")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    device = torch.device(options.device)
    overrides = [f"model.arch={options.arch}", f"dataset.crop_size={options.crop_size}"]
    spec = load_spec(None, [*overrides, f"train.batch_size={options.batch}"])
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(options.annotations, folder)
        found = load_training_boxes(index.folder, spec.dataset.min_obj_size, spec.dataset.max_obj_size)
    data = TrainingSet(
        found,
        image_folder=options.images,
        crop_size=options.crop_size,
        margin_rate=spec.train.margin_rate,
        seed=0,
        max_image_pixels=spec.dataset.max_image_pixels,
    )
    print(f"{found}; {options.arch}, crop {options.crop_size}, batch {options.batch}, {device}, {options.clock} clock")
    spent = loader_seconds(data, options.samples, now)
    print(f"  loader: {1 / spent['all']:.1f} samples/s per process ({1e3 * spent['all']:.2f} ms a sample: ", end="")
    print(", ".join(f"{part} {1e3 * value:.2f}" for part, value in spent.items() if part != "all") + ")")
    network = build_network(spec.model, crop_size=options.crop_size)
    stepper = Stepper(spec, StudentTeacher(network), device, workers=1)
    found_steps = fed_steps(data, stepper, options.batch, options.processes, options.steps, now)
    step, changing = found_steps.step / options.batch, found_steps.changing / options.batch
    print(f"  step: {1 / step:.2f} samples/s; of it the student's view {1e3 * changing:.2f} ms")
    print(f"  needed for less than {MOST_WAITING:.0%} waiting: ", end="")
    print(f"{max(1, math.ceil((1 - MOST_WAITING) * spent['all'] / step))} loader processes with a CPU each")
    print(f"  measured waiting share with {options.processes}: {100 * found_steps.waiting:.2f} %")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
