"""What must hold between the keys of a spec for one task, checked before anything is started."""

from __future__ import annotations

from mal import pretrained, storage
from mal.architectures import TIMM_PREFIX, get_architecture
from mal.errors import SpecError, StorageError
from mal.spec.derived import (
    SHARD_LABELS,
    Action,
    label_dump_path,
    max_actors,
    results_dir,
    shards_folder,
    train_workers,
)
from mal.spec.schema import PoolSpec, Spec


def check_task(spec: Spec, action: Action, *, files: bool = True) -> None:
    """Raise SpecError with every mistake that would stop ``action``: missing keys, files, keys that contradict.

    ``files=False`` does not look for the files: they may be in reach of the cluster only.
    """
    problems = _required(spec, action, files) + _model(spec) + _contradictions(spec)
    if action == "inference":
        problems += _overwritten(spec, files)
    if problems:
        raise SpecError(problems)


def _required(spec: Spec, action: Action, look: bool) -> list[str]:
    """Problems with the input files that the task needs; whether they exist only if ``look``."""
    data, problems = spec.dataset, []
    files: dict[str, tuple[str | None, bool]] = {}
    if action == "train":
        files = {
            "dataset.train_ann_path": (data.train_ann_path, True),
            "dataset.train_img_dir": (data.train_img_dir, True),
            "dataset.val_ann_path": (data.val_ann_path, False),
            "dataset.val_img_dir": (data.val_img_dir, data.val_ann_path is not None),
            "train.resume_training_checkpoint_path": (spec.train.resume_training_checkpoint_path, False),
            "train.pretrained_model_path": (spec.train.pretrained_model_path, False),
        }
    elif action == "evaluate":
        files = {
            "dataset.val_ann_path": (data.val_ann_path, True),
            "dataset.val_img_dir": (data.val_img_dir, True),
            "evaluate.checkpoint": (spec.evaluate.checkpoint, True),
            "evaluate.quality_path": (spec.evaluate.quality_path, False),
            "evaluate.detections_path": (spec.evaluate.detections_path, False),
        }
    else:
        files = {
            "inference.ann_path": (spec.inference.ann_path, True),
            "inference.images_path": (spec.inference.images_path, False),
            "inference.img_dir": (spec.inference.img_dir, True),
            "inference.checkpoint": (spec.inference.checkpoint, True),
            "inference.quality_path": (spec.inference.quality_path, False),
        }
    for key, (path, needed) in files.items():
        if path is None:
            lacking = "; this installation has no built-in model" if key.endswith(".checkpoint") else ""
            text = f"{key} is not set: {action} needs it; add it to the spec or {key}=PATH{lacking}"
            problems += [text] if needed else []
            continue
        if not look:
            continue
        try:
            # A folder of an object store need not exist as an object: there the first read tells.
            found = storage.exists(pretrained.located(path)) or (key.endswith("img_dir") and storage.is_remote(path))
            problems += [] if found else [f"{key} = {path!r}: there is no such file or folder"]
        except StorageError as error:
            problems.append(f"{key} = {path!r}: {error}")
    return problems


def _overwritten(spec: Spec, look: bool) -> list[str]:
    """Problems with inputs of inference that its own files would take the place of; links are followed if ``look``."""
    settings, problems = spec.inference, []
    folder, labels = results_dir(spec, "inference"), label_dump_path(spec)
    key = "results_dir" if settings.results_dir is None else "inference.results_dir"
    where = f"{key} = {(settings.results_dir or spec.results_dir)!r}"
    inputs = {
        "inference.ann_path": settings.ann_path,
        "inference.images_path": settings.images_path,
        "inference.checkpoint": settings.checkpoint,
        "inference.quality_path": settings.quality_path,
    }
    for name, path in inputs.items():
        if path is None:
            continue
        if settings.label_files == "one":
            clash = _same_file(path, labels, look)
        else:
            named = SHARD_LABELS.fullmatch(storage.name(path)) and path.endswith(".gz") == labels.endswith(".gz")
            clash = bool(named) and _same_file(storage.parent(storage.absolute(path)), shards_folder(labels), look)
        if clash and settings.label_dump_path is not None:
            shown = settings.label_dump_path
            problems.append(f"inference.label_dump_path = {shown!r}: it would overwrite {name}; name another file")
            continue
        own = [
            storage.join(folder, file) for file in ("ledger.parquet", "summary.json", "status.json", "manifest.json")
        ]
        taken = [labels] if clash else [file for file in own if _same_file(path, file, look)]
        problems += [f"{where}: {file} would overwrite {name}; choose another folder" for file in taken]
    return problems


def _same_file(one: str, other: str, look: bool) -> bool:
    """Whether two paths name one file or folder."""
    if storage.absolute(one) == storage.absolute(other):
        return True
    first, second = storage.local_path(one), storage.local_path(other)
    if not look or first is None or second is None:
        return False
    return first.exists() and second.exists() and first.samefile(second)


def _model(spec: Spec) -> list[str]:
    """Problems with the architecture. What timm builds is known only to timm: that is checked when it is built."""
    name, crop_size = spec.model.arch, spec.dataset.crop_size
    if name.startswith(TIMM_PREFIX):
        return []
    if spec.model.feature_stride != 16:
        return [f"model.feature_stride = {spec.model.feature_stride}: only timm/ backbones offer a choice; leave it 16"]
    try:
        stride = get_architecture(name).stride
    except SpecError as error:
        return error.problems
    if crop_size % stride:
        near = f"{crop_size // stride * stride} or {(crop_size // stride + 1) * stride}"
        return [f"dataset.crop_size = {crop_size}: it must be a multiple of {stride} for {name}, such as {near}"]
    return []


def _contradictions(spec: Spec) -> list[str]:
    """Problems between keys."""
    problems, train, data = [], spec.train, spec.dataset
    if data.min_obj_size >= data.max_obj_size:
        problems.append(
            f"dataset.min_obj_size = {data.min_obj_size:g}: it must be below max_obj_size ({data.max_obj_size:g})"
        )
    if train.margin_rate[0] > train.margin_rate[1]:
        problems.append(f"train.margin_rate = {list(train.margin_rate)}: the first must not exceed the second")
    if train.crf_kernel_size % 2 == 0:
        problems.append(f"train.crf_kernel_size = {train.crf_kernel_size}: it must be odd")
    if train.crf_value_low_thres >= train.crf_value_high_thres:
        problems.append(
            f"train.crf_value_low_thres = {train.crf_value_low_thres:g}: it must be below crf_value_high_thres"
        )
    if any(value >= 1 for value in train.mask_thres):
        problems.append(f"train.mask_thres = {list(train.mask_thres)}: no probability is above 1; give values below 1")
    if len(train.mask_thres) not in (1, 3):
        problems.append(f"train.mask_thres = {list(train.mask_thres)}: give one value, or three (small, medium, large)")
    if train.min_workers > train_workers(spec):
        problems.append(
            f"train.min_workers = {train.min_workers}: it must not exceed the {train_workers(spec)} workers of "
            "train.num_nodes x train.num_gpus"
        )
    if train.cpu_offload and spec.strategy != "fsdp":
        problems.append("train.cpu_offload = True: only strategy=fsdp can keep its shards in the host's memory")
    if spec.evaluate.comp_clustering:
        problems.append("evaluate.comp_clustering = True: component clustering does not exist here; leave it false")
    pools: dict[str, PoolSpec] = {"evaluate": spec.evaluate, "inference": spec.inference}
    for name, pool in pools.items():
        if pool.min_actors > max_actors(spec, pool):
            problems.append(
                f"{name}.min_actors = {pool.min_actors}: it must not exceed max_actors ({max_actors(spec, pool)})"
            )
        if pool.use_teacher_test and pool.use_mixed_model_test:
            problems.append(f"{name}.use_teacher_test and use_mixed_model_test are both true: choose one")
    return problems
