"""What an actor must know to label shards, and which files a labelling run consists of."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mal import pretrained, storage
from mal.model.losses import MeanFieldOptions
from mal.postprocess import NO_CLEANING, Cleaning
from mal.quality import Calibration, load_calibration
from mal.spec.load import spec_to_values
from mal.spec.schema import ModelSpec, PoolSpec, Spec

_S3_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
)


_TRAINING_ONLY = ("frozen_stages", "pretrained", "vit_dpr", "strict")
"""Keys of the section `model` that change no mask: only a checkpoint that fits is labelled with, strict or not."""


@dataclass(frozen=True, slots=True)
class LabelTask:
    """Everything an actor needs, as plain values and paths that every node reaches."""

    index_folder: str
    img_dir: str
    shards_folder: str
    checkpoint: str
    model_id: str
    """Fingerprint of the checkpoint file; stands in every row."""
    model: ModelSpec
    crop_size: int
    mask_thres: tuple[float, ...]
    margin_rate: tuple[float, ...]
    max_image_pixels: int
    batch_size: int
    precision: str
    load_mask: bool
    use_teacher: bool
    use_mixed: bool
    use_flip: bool
    threads: int
    """Threads of the network on a CPU."""
    decode_threads: int
    """Images that are decoded at the same time for an actor."""
    use_gpu: bool
    results_dir: str
    """The task's results folder, where a pause is asked for (`mal.run.pause`)."""
    run: str
    """Which run of the command this is; see `mal.labelling.attempts`."""
    environment: Mapping[str, str] = field(repr=False)
    """Access to the object store, as this process has it. Not in Ray's runtime environment, which ends up in logs."""
    decode_on_nodes: bool = False
    """Images are decoded by CPU workers, not in the actor's threads."""
    overlap: bool = False
    """Crops and masks are made in threads beside the network's."""
    more_margins: tuple[float, ...] = ()
    """Of further windows around every box."""
    crf: MeanFieldOptions | None = None
    """How masks are refined; None: not at all."""
    cleaning: Cleaning = NO_CLEANING
    """What is done to every mask."""
    encryption_key: str | None = field(default=None, repr=False)
    """Opens an encrypted checkpoint."""
    calibration: Calibration | None = None
    """How quality is estimated; None: the uncalibrated ranking."""
    categories: Mapping[int, str] = field(default_factory=dict)
    """Names of the classes, which a calibration may know; by id."""

    def shard_path(self, shard: int) -> str:
        """The parquet file of a finished shard; its presence means the shard is done."""
        return storage.join(self.shards_folder, shard_name(shard))

    def attempts_path(self, shard: int) -> str:
        """The account of a shard's attempts, kept while it is being worked on."""
        return storage.join(attempts_folder(self.shards_folder), f"part-{shard:06d}.json")


def attempts_folder(shards_folder: str) -> str:
    """Folder of the accounts of attempts."""
    return storage.join(shards_folder, "attempts")


def shard_name(shard: int) -> str:
    """File name of a finished shard."""
    return f"part-{shard:06d}.parquet"


def missing_shards(shards_folder: str, shards: int) -> list[int]:
    """Numbers of the shards whose file is not there yet."""
    present = set(storage.list_files(shards_folder))
    return [shard for shard in range(shards) if shard_name(shard) not in present]


class Sealed:
    """A task on its way to an actor, without fields and with nothing in its ``repr``.

    Ray Data copies the fields of a dataclass, secrets too, into what it tells of a run.
    """

    def __init__(self, task: LabelTask) -> None:
        self._content = pickle.dumps(task)

    def __repr__(self) -> str:
        return "Sealed(LabelTask)"

    def open(self) -> LabelTask:
        return cast(LabelTask, pickle.loads(self._content))


def make_task(
    spec: Spec,
    pool: PoolSpec,
    *,
    folder: str,
    img_dir: str,
    checkpoint: str,
    model_id: str,
    load_mask: bool,
    gpu: bool,
    results_dir: str | None = None,
    categories: Mapping[int, str] | None = None,
) -> LabelTask:
    """The task of one labelling run in ``folder``, from the spec; ``results_dir`` is where a pause is asked for."""
    threads = max(1, int(pool.cpus_per_actor))
    return LabelTask(
        index_folder=storage.join(folder, "index"),
        img_dir=storage.absolute(img_dir),
        shards_folder=storage.join(folder, "shards"),
        checkpoint=checkpoint if pretrained.is_built_in(checkpoint) else storage.absolute(checkpoint),
        model_id=model_id,
        model=spec.model,
        crop_size=spec.dataset.crop_size,
        mask_thres=spec.train.mask_thres,
        margin_rate=spec.train.test_margin_rate,
        max_image_pixels=spec.dataset.max_image_pixels,
        batch_size=pool.batch_size,
        precision=pool.precision,
        load_mask=load_mask,
        use_teacher=pool.use_teacher_test,
        use_mixed=pool.use_mixed_model_test,
        use_flip=pool.use_flip_test,
        threads=threads,
        decode_threads=pool.decode_threads or max(2, threads),
        use_gpu=gpu,
        results_dir=results_dir or folder,
        run=secrets.token_hex(4),
        environment=storage_environment(),
        decode_on_nodes=pool.decode == "nodes",
        overlap=gpu,
        more_margins=pool.test_margins or (),
        crf=MeanFieldOptions.of(spec.train) if pool.use_crf_test else None,
        cleaning=Cleaning(pool.fill_holes, pool.largest_component, pool.min_component_area),
        encryption_key=spec.encryption_key,
        calibration=_calibration(pool.quality_path),
        categories=dict(categories or {}),
    )


def _calibration(path: str | None) -> Calibration | None:
    return None if path is None else load_calibration(storage.read_bytes(pretrained.located(path)), path)


def storage_environment() -> dict[str, str]:
    """The variables of this process that say how S3 is reached, secrets among them.

    Those that name files or services of one machine (a profile, a token file) are left to each node.
    """
    return {name: os.environ[name] for name in _S3_VARIABLES if name in os.environ}


def file_fingerprint(path: str) -> str:
    """16 hex digits of the file's content."""
    digest = hashlib.blake2b(digest_size=8)
    with storage.open_read(pretrained.located(path)) as file:
        while block := file.read(8 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def result_keys(spec: Spec, pool: PoolSpec, *, input_fingerprint: str, model_id: str, img_dir: str) -> dict[str, Any]:
    """Everything that changes the masks: a results folder is bound to these (`mal.run.manifest`).

    Actors, batch size, threads and the like are left out: they may change between two attempts.
    """
    values = spec_to_values(spec)
    return {
        "input": input_fingerprint,
        "model": model_id,
        "img_dir": storage.absolute(img_dir),
        "dataset.crop_size": spec.dataset.crop_size,
        "dataset.max_image_pixels": spec.dataset.max_image_pixels,
        **{f"model.{k}": v for k, v in values["model"].items() if k not in _TRAINING_ONLY},
        "train.mask_thres": values["train"]["mask_thres"],
        "train.test_margin_rate": values["train"]["test_margin_rate"],
        "precision": pool.precision,
        "use_teacher_test": pool.use_teacher_test,
        "use_mixed_model_test": pool.use_mixed_model_test,
        "use_flip_test": pool.use_flip_test,
        "use_crf_test": pool.use_crf_test and dataclasses.asdict(MeanFieldOptions.of(spec.train)),
        "test_margins": pool.test_margins,
        "fill_holes": pool.fill_holes,
        "largest_component": pool.largest_component,
        "min_component_area": pool.min_component_area,
        "quality": None if pool.quality_path is None else file_fingerprint(pool.quality_path),
    }
