"""What each test-time option gains and costs: IoU on boxes with masks, and milliseconds per box, side by side.

    python benchmarks/test_time_options.py COCO_JSON IMAGE_FOLDER [--readme]            the built-in model
    python benchmarks/test_time_options.py COCO_JSON IMAGE_FOLDER --checkpoint C -e SPEC [section.key=value ...]

All options label the same boxes in one process without Ray, some images at a time and in turn, so that a machine whose
speed changes changes it for all. A cost is the median over those turns, as a part of the student's in the same turn;
decoding of images and comparing of masks are not counted. Prints Markdown, which ``--readme`` puts into README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mal.data.index import Index, build_index
from mal.evaluation.box_table import box_table
from mal.evaluation.launch import scores
from mal.evaluation.quality_report import quality_report
from mal.labelling import shard
from mal.labelling.actor import load_predictor
from mal.labelling.decoding import Record, decode_image
from mal.labelling.shard import label_rows
from mal.labelling.task import LabelTask, file_fingerprint, make_task
from mal.spec.load import load_spec
from mal.spec.schema import EvaluateSpec, Spec

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- options -->\n", "<!-- end of options -->"
TURNS = 10
"""So many times every option is timed."""

PLAIN: dict[str, Any] = {
    "use_teacher_test": False,
    "use_mixed_model_test": False,
    "use_flip_test": False,
    "use_crf_test": False,
    "test_margins": None,
    "fill_holes": False,
    "largest_component": False,
    "min_component_area": 0,
    "quality_path": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "student": {},
    "use_teacher_test": {"use_teacher_test": True},
    "use_mixed_model_test": {"use_mixed_model_test": True},
    "use_flip_test": {"use_flip_test": True},
    "use_crf_test": {"use_crf_test": True},
    "test_margins=[0.2,1.0]": {"test_margins": (0.2, 1.0)},
    "mixed + flip": {"use_mixed_model_test": True, "use_flip_test": True},
    "mixed + flip + margins": {"use_mixed_model_test": True, "use_flip_test": True, "test_margins": (0.2, 1.0)},
    "largest_component": {"largest_component": True},
    "fill_holes": {"fill_holes": True},
}


@dataclass
class Contestant:
    """One option at work."""

    name: str
    task: LabelTask
    predictor: Any
    labels: list[pa.Table] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each turn: network, masks and their cleaning."""


class Stopwatch:
    """Adds up the time spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


class Decoded:
    """Images that have been decoded already (`mal.labelling.decoding.Images`)."""

    def __init__(self, work: pa.Table, task: LabelTask) -> None:
        self.images = [decode_image(task, record) for record in work.to_pylist()]

    def __call__(self, records: Iterable[Record]) -> Iterator[tuple[Record, Any]]:
        return zip(records, self.images, strict=True)


def contestants(spec: Spec, img_dir: str, categories: dict[int, str], watch: Stopwatch, names: list[str]) -> list[Any]:
    """One predictor per option, each with its own weights."""
    as_given = {name: getattr(spec.evaluate, name) for name in PLAIN if name != "quality_path"}
    options = {name: OPTIONS[name] for name in names}
    if as_given != {name: PLAIN[name] for name in as_given} and as_given not in [
        {**PLAIN, **o} for o in OPTIONS.values()
    ]:
        options["as the spec says"] = as_given
    made = []
    for name, values in options.items():
        pool: EvaluateSpec = dataclasses.replace(spec.evaluate, **{**PLAIN, **values})
        task = make_task(
            spec,
            pool,
            folder="",
            img_dir=img_dir,
            checkpoint=pool.checkpoint or "",
            model_id=file_fingerprint(pool.checkpoint or ""),
            load_mask=True,
            gpu=torch.cuda.is_available(),
            categories=categories,
        )
        predictor: Any = load_predictor(task)
        for stage in ("crops_of", "answer", "masks_of"):
            setattr(predictor, stage, watch.around(getattr(predictor, stage)))
        made.append(Contestant(name, dataclasses.replace(task, overlap=False), predictor))
    return made


def compete(index: Index, made: list[Contestant], watch: Stopwatch, images: int) -> int:
    """Label all boxes by every option in turn; returns their number."""
    work = pa.concat_tables([index.read_shard(number) for number in range(index.shards)])
    work = work.filter(pa.compute.greater(pa.compute.list_value_length(work["boxes"]), 0)).slice(0, images or None)
    step = max(1, -(-work.num_rows // TURNS))
    for turn, start in enumerate(range(0, work.num_rows, step)):
        part = work.slice(start, step)
        images_of = Decoded(part, made[0].task)
        for one in made[turn % len(made) :] + made[: turn % len(made)]:
            watch.seconds = 0.0
            one.labels.append(label_rows(one.task, one.predictor, images_of, part))
            one.seconds.append(watch.seconds)
        print(f"turn {turn + 1}: {start + part.num_rows} of {work.num_rows} images", flush=True)
    return sum(table.num_rows for table in made[0].labels)


def measured(index: Index, one: Contestant, first: Contestant) -> dict[str, Any]:
    """The figures of an option."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/part-000000.parquet"
        pq.write_table(pa.concat_tables(one.labels), path)
        table = box_table([path], index.summary.categories)
        quality = quality_report([path], index.summary.categories)
    result, boundary = scores(table, "iou").result(), scores(table, "boundary_iou").result()
    per_box = [s * 1000 / labels.num_rows for s, labels in zip(one.seconds, one.labels, strict=True) if labels.num_rows]
    return {
        "option": one.name,
        "box_mean_iou": result["box_mean_iou"],
        "boundary_iou": boundary["box_mean_iou"],
        "mIoU": result["mIoU"],
        "spearman": quality["calibrated"]["spearman"] if "calibrated" in quality else None,
        "ms_per_box": statistics.median(per_box),
        "cost": statistics.median(a / b for a, b in zip(one.seconds, first.seconds, strict=True) if b),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = ["| option | IoU over boxes | gain | boundary IoU | mIoU | rank corr. | ms per box | cost |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    base = rows[0]["box_mean_iou"]
    for row in rows:
        spearman = "-" if row["spearman"] is None else f"{row['spearman']:.3f}"
        ious = (f"{row['box_mean_iou']:.4f}", f"{row['box_mean_iou'] - base:+.4f}", f"{row['boundary_iou']:.4f}")
        cells = (row["option"], *ious, f"{row['mIoU']:.4f}", spearman, f"{row['ms_per_box']:.1f}", f"{row['cost']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gain and cost of every test-time option.")
    parser.add_argument("annotations", help="COCO file with masks")
    parser.add_argument("images", help="folder of its images")
    parser.add_argument("--checkpoint", help="by default the built-in model")
    parser.add_argument("-e", "--experiment_spec", metavar="SPEC", help="the spec that the checkpoint was trained with")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS), help="by default all")
    parser.add_argument("--limit", type=int, default=0, metavar="IMAGES", help="the first images only")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="values that replace the spec's"
    )
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    given = [] if options.checkpoint is None else [f"evaluate.checkpoint={options.checkpoint}"]
    spec = load_spec(options.experiment_spec, [*options.set, *given], "evaluate")
    if spec.evaluate.checkpoint is None:
        parser.error("this installation has no built-in model; give --checkpoint")
    watch = Stopwatch()
    shard.clean = watch.around(shard.clean)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(options.annotations, folder, load_mask=True)
        names = list(dict.fromkeys(["student", *options.options]))
        made = contestants(spec, options.images, index.summary.categories, watch, names)
        boxes = compete(index, made, watch, options.limit)
        rows = [measured(index, one, made[0]) for one in made]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text = f"{spec.model.arch}, crop {spec.dataset.crop_size}, {boxes:,} boxes, {device}:\n\n{markdown(rows)}"
    print(f"\n{text}")
    if options.readme:
        before, begin, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{begin}{text}\n{END}{rest.partition(END)[2]}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
