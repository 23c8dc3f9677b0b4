"""Draws the learning curve of train folders from their own TensorBoard events: IoU on the validation boxes over steps.

    python benchmarks/learning_curve.py results/from_scratch/train results/from_scratch_2/train \
        --picture benchmarks/learning_curve.png --rule "filled box" 0.585 --rule GrabCut 0.642

Several folders are stages, one after the other. The curve is the student's, as training validates it: no mirrored view,
no refinement. Below it the loss against the refined target, a mean over every hundredth of the steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 52, 132, 26, 34
PAPER, INK, GREY = (255, 255, 255), (32, 32, 32), (150, 150, 150)
COLOURS = {"box_mean_iou": (200, 40, 40), "mIoU": (30, 90, 190), "loss/crf": (110, 110, 110)}
Points = list[tuple[float, float]]


class Plot:
    """A picture with one pair of axes; values map to its pixels."""

    def __init__(self, image: Image.Image, low: float, high: float, last: float) -> None:
        self.draw, self.font = ImageDraw.Draw(image), ImageFont.load_default(12)
        self.low, self.high, self.last = low, high, last

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Step and value to pixels."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / self.last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)

    def line(self, points: Points, colour: tuple[int, int, int], width: int, dots: bool = False) -> None:
        """A curve, with a dot at every point if there are few."""
        places = [self.place(*point) for point in points]
        self.draw.line(places, fill=colour, width=width)
        for x, y in places if dots else ():
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)

    def text(self, x: float, y: float, words: str, colour: tuple[int, int, int] = INK, anchor: str = "lm") -> None:
        """Words at a pixel."""
        self.draw.text((x, y), words, fill=colour, font=self.font, anchor=anchor)


def draw(scalars: dict[str, Points], rules: Sequence[tuple[str, float]]) -> Image.Image:
    """The picture of validation scores, rules and the loss."""
    scores = {name: scalars[f"validation/{name}"] for name in ("box_mean_iou", "mIoU")}
    values = [value for points in scores.values() for _, value in points] + [value for _, value in rules]
    low, high = np.floor(20 * min(values)) / 20, np.ceil(20 * max(values)) / 20
    last = max(step for points in scores.values() for step, _ in points)
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    plot = Plot(image, float(low), float(high), last)
    edge = WIDTH - RIGHT
    for value in np.arange(low, high + 1e-9, 0.05):
        y = plot.place(0, float(value))[1]
        plot.draw.line((LEFT, y, edge, y), fill=(230, 230, 230))
        plot.text(LEFT - 6, y, f"{value:.2f}", anchor="rm")
    for name, value in rules:
        y = plot.place(0, value)[1]
        for x in range(LEFT, edge, 10):
            plot.draw.line((x, y, x + 5, y), fill=GREY)
        plot.text(edge + 4, y, f"{name} {value:.3f}", GREY)
    _draw_loss(plot, scalars["loss/crf"])
    for name, points in scores.items():
        plot.line(points, COLOURS[name], 2, dots=True)
        y = plot.place(*points[-1])[1] - 14 * (name == "mIoU")  # the two end close together
        plot.text(edge + 4, y, f"{name} {points[-1][1]:.3f}", COLOURS[name])
    for share in (0, 0.25, 0.5, 0.75, 1):
        plot.text(plot.place(share * last, 0)[0], HEIGHT - BOTTOM + 12, f"{share * last:,.0f}", anchor="mm")
    plot.text(LEFT, 12, "IoU on validation boxes, over steps; grey: loss against the target, without a scale")
    return image


def _draw_loss(plot: Plot, points: Points) -> None:
    """The loss in the lower third, scaled to it."""
    parts = [part for part in np.array_split(np.array(points), 100) if len(part)]
    means = np.array([part.mean(axis=0) for part in parts])
    scale = (plot.high - plot.low) / 3 / means[:, 1].max()
    plot.line([(float(step), plot.low + scale * float(value)) for step, value in means], COLOURS["loss/crf"], 1)


def read_scalars(train_folder: str) -> dict[str, Points]:
    """All scalars in the events of a train folder: name -> (step, value)."""
    events = EventAccumulator(str(Path(train_folder) / "events"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def joined(stages: Sequence[dict[str, Points]]) -> dict[str, Points]:
    """The scalars of stages, each beginning where the one before it ended."""
    found: dict[str, Points] = {}
    start = 0.0
    for scalars in stages:
        for name, points in scalars.items():
            found.setdefault(name, []).extend((start + step, value) for step, value in points)
        start += max(step for points in scalars.values() for step, _ in points)
    return found


def main() -> None:
    """Read, draw, print the points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_folders", nargs="+")
    parser.add_argument("--picture", required=True)
    parser.add_argument("--rule", nargs=2, action="append", default=[], metavar=("NAME", "IOU"))
    arguments = parser.parse_args()
    scalars = joined([read_scalars(folder) for folder in arguments.train_folders])
    draw(scalars, [(name, float(value)) for name, value in arguments.rule]).quantize(64).save(arguments.picture)
    for step, value in scalars["validation/box_mean_iou"]:
        print(f"step {step:6.0f}: box-mean IoU {value:.4f}")


if __name__ == "__main__":
    main()
