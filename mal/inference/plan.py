"""``mal inference --dry-run``: what the command would do, and how long that might take. It leaves nothing behind."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from mal import storage
from mal.data.index import Index, build_index, open_index
from mal.data.index_folder import SUMMARY_FILE
from mal.labelling.pool import PoolSize, pool_size
from mal.labelling.run import announce, run_keys
from mal.labelling.sample import Timing, spread, time_on_cluster
from mal.labelling.task import make_task, missing_shards
from mal.run.cluster import connected
from mal.run.manifest import begun_with
from mal.run.progress import duration
from mal.spec.checks import check_task
from mal.spec.derived import results_dir
from mal.spec.schema import Spec


@dataclass(frozen=True)
class Plan:
    """What a run of inference has before it."""

    index: Index
    todo: list[int]
    """Shards that are not done."""
    size: PoolSize | None
    """None if there is nothing to do."""
    timing: Timing | None

    @property
    def boxes_left(self) -> int:
        return sum(self.index.summary.shards[shard] for shard in self.todo)

    @property
    def seconds(self) -> float | None:
        """Of labelling, if every actor is as fast as the sample's; None: unknown."""
        if self.size is None or self.timing is None or not self.timing.boxes:
            return None
        return self.timing.start + self.boxes_left / (self.timing.boxes_per_second * self.size.most)


def plan_inference(spec: Spec) -> Plan:
    """Index the input, see what is done already, and time a sample; print all that.

    Raises:
        SpecError, RunMismatchError: as the real run would.
    """
    check_task(spec, "inference")
    folder, settings = results_dir(spec, "inference"), spec.inference
    ann_path, img_dir = settings.ann_path or "", settings.img_dir or ""
    announce(settings)
    keys = run_keys(spec, settings, ann_path, settings.images_path, img_dir, settings.load_mask)
    begun = begun_with(folder, keys)
    own_index = storage.join(folder, "index")
    with tempfile.TemporaryDirectory(prefix="mal-plan-") as temporary:
        if begun and storage.exists(storage.join(own_index, SUMMARY_FILE)):
            index = open_index(own_index)
        else:
            index = build_index(
                ann_path,
                temporary,
                images_path=settings.images_path,
                load_mask=settings.load_mask,
                shard_boxes=settings.shard_boxes,
                max_image_pixels=spec.dataset.max_image_pixels,
            )
        plan = _timed(spec, folder, index, img_dir, str(keys["model"]))
    print(report(plan), flush=True)
    return plan


def _timed(spec: Spec, folder: str, index: Index, img_dir: str, model_id: str) -> Plan:
    settings = spec.inference
    todo = missing_shards(storage.join(folder, "shards"), index.shards)
    if not todo:
        return Plan(index, [], None, None)
    with connected(spec.ray) as cluster:
        size = pool_size(spec, settings, cluster, len(todo))
        task = make_task(
            spec,
            settings,
            folder=folder,
            img_dir=img_dir,
            checkpoint=settings.checkpoint or "",
            model_id=model_id,
            load_mask=settings.load_mask,
            gpu=cluster.gpus > 0,
        )
        return Plan(index, todo, size, time_on_cluster(task, spread(index, todo), size))


def report(plan: Plan) -> str:
    """What is printed."""
    summary = plan.index.summary
    lines = ["dry run: nothing was written", f"annotations in   {summary.annotations:>12,}"]
    lines += [f"boxes to label   {summary.boxes:>12,}  ({summary.clipped:,} of them clipped)"]
    lines += [f"  {band:<15}{count:>12,}" for band, count in summary.bands.items()]
    lines += [f"on images        {summary.images - summary.images_without_boxes:>12,}"]
    lines += [f"crowd, kept      {summary.crowd:>12,}", f"rejected         {sum(summary.rejected.values()):>12,}"]
    lines += [f"  {reason:<15}{count:>12,}" for reason, count in summary.rejected.items()]
    done = plan.index.shards - len(plan.todo)
    lines += [f"shards           {plan.index.shards:>12,}  ({done:,} done)"]
    lines += [f"boxes left       {plan.boxes_left:>12,}"]
    if plan.size is not None and plan.timing is not None:
        timing, estimate = plan.timing, plan.seconds
        lines.append(f"sample: {timing.boxes:,} boxes, {timing.boxes_per_second:.1f} boxes/s of one actor")
        told = "unknown, the sample was too small" if estimate is None else f"about {duration(estimate)}"
        lines.append(f"time: {told}, with {plan.size.describe()}")
    return "\n".join(lines)
