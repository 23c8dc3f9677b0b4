"""One labelling run in a folder: index, manifest, pool. What inference and evaluation have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mal import pretrained, storage
from mal.data.index import Index, Summary, build_index, fingerprint, open_index
from mal.data.index_folder import SUMMARY_FILE
from mal.errors import InputError, MalError
from mal.labelling.actor import ShardLabeler
from mal.labelling.fit import check_checkpoint
from mal.labelling.pool import label_all, pool_size
from mal.labelling.task import attempts_folder, file_fingerprint, make_task, missing_shards, result_keys, shard_name
from mal.run import pause
from mal.run.cluster import connected
from mal.run.manifest import begun_with, claim
from mal.run.status import StatusLog
from mal.run.summary import Stages
from mal.spec.schema import PoolSpec, Spec


@dataclass(frozen=True)
class LabelledRun:
    """A run whose every shard is there."""

    index: Index
    shards: list[str]
    """Paths of the parquet files, in order."""
    seconds: float
    """Spent on labelling, without starting Ray and indexing."""
    boxes: int
    """Labelled or rejected in this run; those of earlier attempts are not counted."""
    actors: str
    stages: Stages
    """index, start (of Ray) and label."""
    hardware: tuple[dict[str, Any], ...]
    """As of `mal.run.cluster.Cluster`; empty if nothing was left to label."""


def label_file(
    spec: Spec,
    pool: PoolSpec,
    *,
    folder: str,
    ann_path: str,
    images_path: str | None,
    img_dir: str,
    load_mask: bool,
    status: StatusLog,
    labeler: type[ShardLabeler] = ShardLabeler,
) -> LabelledRun:
    """Label every box of ``ann_path`` into ``<folder>/shards``; what is there already is not done again.

    Args:
        labeler: see `mal.labelling.pool.label_all`.

    Raises:
        RunMismatchError: the folder was begun with another input, model or spec.
        CheckpointError: the checkpoint does not fit the spec's model.
        RunPausedError: the run was asked to pause.
        MalError: whatever stopped the work.
    """
    announce(pool)
    stages = Stages()
    hardware: tuple[dict[str, Any], ...] = ()
    keys = run_keys(spec, pool, ann_path, images_path, img_dir, load_mask)
    if not begun_with(folder, keys) and labeler.load is ShardLabeler.load:  # others need not have a network
        _tell(status, check_checkpoint(spec, pool))  # before the folder is bound to what may have to be corrected
    claim(folder, keys)
    index = _index(spec, pool, storage.join(folder, "index"), ann_path, images_path, load_mask, keys["input"])
    stages.done("index")
    total = index.summary.boxes
    shards_folder = storage.join(folder, "shards")
    todo, actors, seconds = missing_shards(shards_folder, index.shards), "none", 0.0
    done = total - sum(index.summary.shards[shard] for shard in todo)
    _tell(status, f"{describe(index.summary)}; {len(todo)} of {index.shards} shards to do")
    if todo:
        with connected(spec.ray) as cluster:
            size = pool_size(spec, pool, cluster, len(todo))
            actors = size.describe()
            print(f"labelling with {actors}{'' if cluster.gpus else ' (this cluster has no GPU)'}", flush=True)
            task = make_task(
                spec,
                pool,
                folder=folder,
                results_dir=storage.parent(status.path),
                img_dir=img_dir,
                checkpoint=pool.checkpoint or "",
                model_id=keys["model"],
                load_mask=load_mask,
                gpu=cluster.gpus > 0,
                categories=index.summary.categories,
            )
            hardware = cluster.hardware
            stages.done("start")
            seconds = label_all(task, size, todo=todo, boxes=total, boxes_done=done, status=status, labeler=labeler)
            stages.done("label")
    paths = _finished(shards_folder, index.shards, storage.parent(status.path))
    return LabelledRun(index, paths, seconds, total - done, actors, stages, hardware)


def _finished(shards_folder: str, shards: int, results_dir: str) -> list[str]:
    """The paths of all shards; what was left beside them is deleted. RunPausedError or MalError if one is missing."""
    left = missing_shards(shards_folder, shards)
    if left and pause.asked(results_dir):
        raise pause.paused(f"{shards - len(left)} of {shards} shards are done")
    if left:
        raise MalError(f"{len(left)} shards were not finished; run the same command again")
    storage.delete(attempts_folder(shards_folder))  # that of a shard whose actor was killed right after writing it
    storage.delete_leftovers(shards_folder)
    return [storage.join(shards_folder, shard_name(shard)) for shard in range(shards)]


def _tell(status: StatusLog, line: str) -> None:
    status.write("RUNNING", line)
    print(line, flush=True)


def announce(pool: PoolSpec) -> None:
    """Say that the built-in model is used, if it is, and what was measured of it."""
    if pretrained.is_built_in(pool.checkpoint):
        print(f"checkpoint: {pretrained.default_model()}", flush=True)


def run_keys(
    spec: Spec, pool: PoolSpec, ann_path: str, images_path: str | None, img_dir: str, load_mask: bool
) -> dict[str, Any]:
    """What a run's folder is bound to; reads the input and the checkpoint through."""
    assert pool.checkpoint is not None, "checked before"
    model_id, content = file_fingerprint(pool.checkpoint), fingerprint(ann_path, images_path)
    keys = result_keys(spec, pool, input_fingerprint=content, model_id=model_id, img_dir=img_dir)
    return {**keys, "load_mask": load_mask}


def _index(
    spec: Spec, pool: PoolSpec, folder: str, ann_path: str, images_path: str | None, load_mask: bool, wanted: str
) -> Index:
    """The run's index. One that is there is kept, whatever `shard_boxes` says now: finished shards are cut by it.

    Raises:
        InputError: the input's content is no longer the one with the fingerprint ``wanted``.
    """
    if storage.exists(storage.join(folder, SUMMARY_FILE)):
        index = open_index(folder)
    else:
        index = build_index(
            ann_path,
            folder,
            images_path=images_path,
            load_mask=load_mask,
            shard_boxes=pool.shard_boxes,
            max_image_pixels=spec.dataset.max_image_pixels,
            progress=lambda line: print(line, flush=True),
        )
    if index.summary.fingerprint == wanted:
        return index
    storage.delete(index.folder)
    raise InputError(
        f"{ann_path} changed while it was read; when it is complete, run again with another results_dir, or delete this"
    )


def describe(summary: Summary) -> str:
    """The input in one line."""
    bands = ", ".join(f"{count:,} {band}" for band, count in summary.bands.items())
    rejected = sum(summary.rejected.values())
    return (
        f"{summary.boxes:,} boxes ({bands}) on {summary.images - summary.images_without_boxes:,} images to label, "
        f"{rejected:,} rejected, {summary.crowd:,} crowd regions kept"
    )
