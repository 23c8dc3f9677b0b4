"""The door of inference: label, merge, and tell what became of every box."""

from __future__ import annotations

import time
from typing import Any

from mal import pretrained, storage
from mal.errors import MalError
from mal.inference.merge import MergeCounts, OutputOptions, merge
from mal.labelling.actor import ShardLabeler
from mal.labelling.run import LabelledRun, label_file
from mal.run.progress import duration
from mal.run.status import task_status
from mal.run.summary import write_summary
from mal.spec.checks import check_task
from mal.spec.derived import label_dump_path, results_dir, shards_folder
from mal.spec.schema import InferenceSpec, Spec


def run_inference(spec: Spec, labeler: type[ShardLabeler] = ShardLabeler) -> dict[str, Any]:
    """Label every box of ``inference.ann_path``, going on where an earlier attempt ended.

    Args:
        labeler: see `mal.labelling.pool.label_all`.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        SpecError: before anything is started.
        MalError: whatever stopped the work.
    """
    check_task(spec, "inference")
    folder, settings = results_dir(spec, "inference"), spec.inference
    storage.make_folder(folder)
    with task_status(folder, "inference") as status:
        begun = time.time()
        run = label_file(
            spec,
            settings,
            folder=folder,
            ann_path=settings.ann_path or "",
            images_path=settings.images_path,
            img_dir=settings.img_dir or "",
            load_mask=settings.load_mask,
            status=status,
            labeler=labeler,
        )
        labels, ledger = label_dump_path(spec), storage.join(folder, "ledger.parquet")
        counts = merge(run.index, run.shards, labels, ledger, output_options(settings))
        run.stages.done("merge")
        _check_sum(run, counts)
        facts = {
            "annotations": run.index.summary.annotations,
            "labelled": counts.labelled,
            "clipped": counts.clipped,
            "crowd": counts.crowd,
            "rejected": dict(sorted(counts.rejected.items())),
            "low_quality": counts.low_quality,
            "boxes_per_second": run.boxes / run.seconds if run.seconds else None,
            "actors": run.actors,
            "labels": shards_folder(labels) if settings.label_files == "shards" else labels,
            "shards": storage.parent(run.shards[0]) if run.shards else None,
            "ledger": ledger,
        }
        if pretrained.is_built_in(settings.checkpoint):
            facts["built_in_model"] = pretrained.default_model().facts()
        summary = write_summary(folder, "inference", spec, begun, run.stages, run.hardware, facts)
        status.write("SUCCESS", _one_line(counts))
        print(report(run, counts, summary), flush=True)
        return summary


def output_options(settings: InferenceSpec) -> OutputOptions:
    """How the spec wants the COCO file."""
    return OutputOptions(
        polygons=settings.mask_format == "polygon",
        dump_quality=settings.dump_quality,
        min_quality=settings.min_quality,
        drop_low_quality=settings.low_quality == "drop",
        per_shard=settings.label_files == "shards",
    )


def _check_sum(run: LabelledRun, counts: MergeCounts) -> None:
    """Every annotation of the input has one outcome, or something is badly wrong."""
    if counts.total != run.index.summary.annotations:
        raise MalError(
            f"the input has {run.index.summary.annotations} annotations, but {counts.total} are accounted for: the "
            "results folder was changed by something else; delete it and run again"
        )


def _one_line(counts: MergeCounts) -> str:
    return (
        f"{counts.labelled + counts.clipped:,} boxes labelled ({counts.clipped:,} of them clipped), "
        f"{counts.rejected.total():,} rejected, {counts.crowd:,} crowd regions kept"
    )


def report(run: LabelledRun, counts: MergeCounts, summary: dict[str, Any]) -> str:
    """What is printed at the end."""
    lines = [f"annotations in   {run.index.summary.annotations:>10,}", f"labelled         {counts.labelled:>10,}"]
    lines += [f"labelled clipped {counts.clipped:>10,}", f"crowd, kept      {counts.crowd:>10,}"]
    if counts.low_quality:
        lines += [f"  low quality    {counts.low_quality:>10,}"]
    lines += [f"rejected         {counts.rejected.total():>10,}"]
    lines += [f"  {reason:<15}{n:>10,}" for reason, n in counts.rejected.most_common()]
    if run.seconds:
        rate = f"{run.boxes / run.seconds:.1f} boxes/s with {run.actors}"
        lines.append(f"labelling took {duration(run.seconds)}: {rate}")
    lines += [f"masks:  {summary['labels']}", f"rows:   {summary['shards']}", f"ledger: {summary['ledger']}"]
    return "\n".join(lines)
