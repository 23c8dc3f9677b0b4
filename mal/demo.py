"""``mal demo``: the whole line on rendered scenes, from boxes alone to a sheet of pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from mal import masks, pictures, storage
from mal.data import images
from mal.data.index import open_index
from mal.data.scenes import ScenePaths, write_scenes
from mal.evaluation.baselines import score_rules
from mal.evaluation.launch import run_evaluation
from mal.inference.launch import run_inference
from mal.run.cluster import connected
from mal.run.progress import duration
from mal.spec.load import load_spec
from mal.spec.schema import Spec
from mal.training.launch import run_training

TRAIN_SCENES, VAL_SCENES = 400, 48
TRAIN_SEED, VAL_SEED = 1, 2
PICTURES = 12

# Found by trying, for learning from scratch within three minutes on two CPU cores; not a recipe for photographs. A
# convolutional backbone learns from so little, a ViT stays at the filled box.
RECIPE: dict[str, Any] = {
    "dataset.crop_size": 96,
    "dataset.num_workers_per_gpu": 0,
    "model.arch": "timm/resnet18",
    "model.mask_head_hidden_channel": 64,
    "model.mask_head_out_channel": 64,
    "model.teacher_momentum": 0.95,
    "train.num_gpus": 2,
    "train.num_epochs": 4,
    "train.batch_size": 8,
    "train.lr": 9.4e-5,
    "train.optim_betas": [0.9, 0.999],
    "train.warmup_epochs": 0.4,
    "train.min_lr_rate": 0.05,
    "train.loss_mil_step": 0,
    "train.loss_crf_step": 30,
    "train.loss_crf_weight": 2.0,
    "train.crf_kernel_size": 5,
    "train.crf_zeta": 0.3,
    "train.crf_num_iter": 15,
    "train.crf_value_low_thres": 0.12,
    "train.mask_thres": [0.5],
    "train.validation_interval": 2,
    "train.checkpoint_interval": 2,
    "evaluate.batch_size": 8,
    "evaluate.shard_boxes": 64,
    "inference.batch_size": 8,
    "inference.shard_boxes": 64,
}


def run_demo(folder: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Render, train, evaluate, label, draw; what an earlier run in ``folder`` finished is not done again.

    Returns:
        mIoU of the masks and of the simple rules, and the path of the picture sheet.
    """
    begun = time.time()
    folder = storage.absolute(folder)
    spec_path = _prepare(folder, overrides)
    spec = load_spec(spec_path)
    print(f"== the demo's spec: {spec_path}", flush=True)
    with connected(spec.ray):
        print("\n== mal train", flush=True)
        run_training(spec)
        print("\n== mal evaluate", flush=True)
        metrics = run_evaluation(spec)
        print("\n== mal inference", flush=True)
        run_inference(spec)
    rules = score_rules(open_index(storage.join(folder, "train", "validation", "index")))
    found = {"MAL": metrics["mIoU"]} | {name: scores.result()["mIoU"] for name, scores in rules.items()}
    sheet = draw_sheet(spec, storage.join(folder, "masks.png"))
    print("\nmIoU on scenes that were not trained on, learned from boxes alone:")
    for name, miou in found.items():
        print(f"  {name:20}{100 * miou:6.1f} %")
    print(f"pictures: {sheet}\nin all {duration(time.time() - begun)}", flush=True)
    result = {"mIoU": found, "pictures": sheet, "seconds": time.time() - begun}
    storage.write_bytes(storage.join(folder, "demo.json"), json.dumps(result, indent=1).encode() + b"\n")
    return result


def _prepare(folder: str, overrides: Sequence[str]) -> str:
    """Render the scenes, unless they are there, and write the spec; returns its path."""
    train, val = _scenes(folder, "train", TRAIN_SCENES, TRAIN_SEED), _scenes(folder, "val", VAL_SCENES, VAL_SEED)
    checkpoint = storage.join(folder, "train", "mal_model_latest.pth")
    paths = {
        "results_dir": folder,
        "dataset.train_ann_path": train.annotations,
        "dataset.train_img_dir": train.images,
        "dataset.val_ann_path": val.annotations,
        "dataset.val_img_dir": val.images,
        "evaluate.checkpoint": checkpoint,
        "inference.checkpoint": checkpoint,
        "inference.ann_path": val.annotations,
        "inference.img_dir": val.images,
        "inference.load_mask": True,
    }
    config = OmegaConf.create()
    for key, value in (paths | RECIPE).items():
        OmegaConf.update(config, key, value)
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    path = storage.join(folder, "demo.yaml")
    storage.write_bytes(path, OmegaConf.to_yaml(merged).encode())
    return path


def _scenes(folder: str, name: str, count: int, seed: int) -> ScenePaths:
    target = storage.join(folder, "scenes", name)
    paths = ScenePaths(storage.join(target, "annotations.json"), storage.join(target, "images"))
    if not storage.exists(paths.annotations):  # written last
        print(f"rendering {count} scenes: {target}", flush=True)
        write_scenes(target, images=count, seed=seed)
    return paths


def draw_sheet(spec: Spec, path: str) -> str:
    """A sheet of the first validation images with the masks that inference made; returns its path."""
    shards = storage.join(spec.results_dir, "inference", "shards")
    rows: list[dict[str, Any]] = []
    for name in storage.list_files(shards):
        with storage.open_read(storage.join(shards, name)) as file:
            rows += [row for row in pq.read_table(file).to_pylist() if row["counts"] is not None]
    names = open_index(storage.join(spec.results_dir, "inference", "index")).summary.categories
    tiles = []
    for image_id in sorted({row["image_id"] for row in rows})[:PICTURES]:
        own = [row for row in rows if row["image_id"] == image_id]
        image_path = images.safe_join(spec.inference.img_dir or "", own[0]["file_name"])
        tiles.append(
            pictures.Tile(
                images.decode(image_path, max_pixels=spec.dataset.max_image_pixels),
                [masks.rle(row["counts"], row["height"], row["width"]) for row in own],
                [row["bbox"] for row in own],
                [pictures.label(names[row["category_id"]], row["iou"]) for row in own],
            )
        )
    pictures.picture_sheet(tiles, path)
    return path
