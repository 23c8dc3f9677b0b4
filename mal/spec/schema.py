"""Every key of a spec file: its type, default, bounds and a line of meaning under each.

The names and defaults of the peers' keys are kept (METHOD section 6), so that their spec files load unchanged.
Nothing is ever written back into a spec; numbers that follow from it are functions of `mal.spec.derived`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT_ARCHITECTURE = "vit-mae-base/16"


def key(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    length: int | None = None,
) -> Any:
    """A field with bounds: ``low <= value <= high``, ``value > above``, one of ``choices``, a list of ``length``.

    The bounds hold for every element of a list.
    """
    bounds = {"low": low, "high": high, "above": above, "choices": choices, "length": length}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Where the boxes and images are, and how they become network input."""

    train_ann_path: str | None = None
    """COCO file with the boxes to train on."""
    train_img_dir: str | None = None
    """Folder that the file names of the training images are relative to."""
    val_ann_path: str | None = None
    """COCO file to validate and evaluate on; needs masks for IoU."""
    val_img_dir: str | None = None
    """Folder of the validation images."""
    type: str = key("coco", choices=("coco",))
    """Format of the annotation files."""
    crop_size: int = key(512, low=32, high=4096)
    """Side of the square network input, in pixels; a multiple of the backbone's patch size."""
    load_mask: bool = True
    """Read the masks of the validation file, to measure IoU."""
    min_obj_size: float = key(2048.0, low=0)
    """Boxes of this area or less (px^2) are not trained on; they are labelled all the same."""
    max_obj_size: float = key(1e10, above=0)
    """Boxes of this area or more (px^2) are not trained on."""
    num_workers_per_gpu: int = key(2, low=0, high=256)
    """Processes that decode and crop for each training worker; 0: the worker itself."""
    augmentation: float = key(1.0, low=0, high=1)
    """Strength of the changes of colour and sharpness in the student's view: 1 as published, 0 none."""
    max_image_pixels: int = key(200_000_000, low=1)
    """Images with more pixels are rejected instead of decoded (a decoded image takes 3 bytes a pixel)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The network."""

    arch: str = DEFAULT_ARCHITECTURE
    """Backbone architecture (`mal models` lists them)."""
    frozen_stages: tuple[int, ...] = key((-1,), low=-1)
    """Backbone stages that are not trained: 0 is the patch embedding, i is block i; -1 is none."""
    mask_head_num_convs: int = key(4, low=1, high=32)
    """Convolutions of the mask head."""
    mask_head_hidden_channel: int = key(256, low=1)
    """Width between them."""
    mask_head_out_channel: int = key(256, low=1)
    """Width of the mask features and of the box vector."""
    teacher_momentum: float = key(0.996, low=0, high=1)
    """Share of the old teacher that is kept at every step."""
    not_adjust_scale: bool = False
    """Run the mask head at one scale for all boxes, instead of 1/2, 1 and 2 for small, medium and large ones."""
    mask_scale_ratio_pre: float = key(1.0, above=0)
    """Factor on the size at which the mask head runs."""
    mask_scale_ratio: float = key(2.0, above=0)
    """Upsampling inside the mask head."""
    vit_dpr: float = key(0.0, low=0, high=0.99)
    """Drop-path rate of the backbone, in training."""
    feature_stride: int = key(16, low=4, high=32)
    """Coarsest feature map that is taken of a `timm/` backbone, in pixels; the others have their own."""
    pretrained: bool = False
    """Start from the weights that timm offers for this backbone (needs a network connection)."""
    strict: bool = True
    """Refuse checkpoints whose names or shapes are not those of the network; false: load what fits."""


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """Training from boxes."""

    num_epochs: int = key(10, low=1)
    """Passes over the training boxes."""
    batch_size: int = key(3, low=1)
    """Boxes per worker and step."""
    accum_grad_batches: int = key(1, low=1)
    """Batches whose gradients are added up before a step of the optimiser."""
    num_gpus: int = key(1, low=1)
    """Workers per node: one per GPU, or CPU workers where the cluster has no GPU."""
    gpu_ids: tuple[int, ...] = key((0,), low=0)
    """The GPUs' numbers; when their count and num_gpus disagree the larger wins."""
    num_nodes: int = key(1, low=1)
    """Nodes; there are num_nodes x num_gpus workers."""
    min_workers: int = key(0, low=0)
    """Elastic: train on with as few as these when nodes are lost, with all when they come; 0: a fixed number."""
    cpus_per_worker: float = key(1.0, above=0)
    """CPUs that Ray reserves for each worker."""
    max_failures: int = key(3, low=-1)
    """How often training goes on from its latest checkpoint after a worker died; -1: without end."""
    seed: int = 1234
    """Seed of weights, order and augmentation; negative: none."""
    checkpoint_interval: int = key(1, low=1)
    """Epochs between checkpoints, or optimiser steps, by checkpoint_interval_unit."""
    checkpoint_interval_unit: str = key("epoch", choices=("epoch", "step"))
    """What checkpoint_interval counts. By steps, training goes on within an epoch; every epoch is saved as well."""
    validation_interval: int = key(1, low=1)
    """Epochs between validations."""
    resume_training_checkpoint_path: str | None = None
    """Go on from this checkpoint, instead of the latest in the train folder."""
    pretrained_model_path: str | None = None
    """Weights to start from: MAE, DeiT, timm, or a checkpoint of MAL (.pth or .safetensors)."""
    results_dir: str | None = None
    """Folder of training results; by default <results_dir>/train."""
    loggers: tuple[str, ...] = key(("tensorboard",), choices=("tensorboard", "mlflow", "wandb"))
    """Where losses and scores are logged besides status.json; mlflow and wandb want `mal-on-ray[loggers]`."""
    use_amp: bool = True
    """Mixed precision: bfloat16 where the hardware has it, else float16 with loss scaling on a GPU, else float32."""
    activation_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass, instead of keeping what is in them: less memory."""
    cpu_offload: bool = False
    """With strategy fsdp: keep parameters, gradients and optimiser state in the host's memory, and step there."""
    optim_type: str = key("adamw", choices=("adamw",))
    """Optimiser."""
    optim_momentum: float = key(0.9, low=0, high=1)
    """Kept for old spec files; AdamW takes optim_betas."""
    optim_betas: tuple[float, ...] = key((0.9, 0.9), low=0, high=0.99999, length=2)
    """AdamW's betas."""
    optim_eps: float = key(1e-8, above=0)
    """AdamW's epsilon."""
    decay_norms: bool = True
    """Apply weight decay to biases, norms and position embeddings too, as the published recipe does."""
    lr: float = key(1e-6, above=0)
    """Learning rate per box: the peak is lr x batch_size x the workers at hand, on all nodes."""
    min_lr: float = key(0.0, low=0)
    """Lowest learning rate, if above peak x min_lr_rate."""
    min_lr_rate: float = key(0.2, low=0, high=1)
    """Lowest learning rate as a part of the peak."""
    wd: float = key(5e-4, low=0)
    """Weight decay."""
    warmup_epochs: float = key(1.0, low=0)
    """Epochs of linear warm-up of the learning rate."""
    num_wave: float = key(1.0, above=0)
    """Half-waves of the cosine."""
    margin_rate: tuple[float, ...] = key((0.0, 1.2), low=0, length=2)
    """Range of the random margin of a training window, in half-extents of its box."""
    margin_gate: bool = True
    """Shift training windows at random (margins times g on one side, 1 - g on the other); off: boxes stay centred."""
    test_margin_rate: tuple[float, ...] = key((0.6, 0.6), low=0, length=2)
    """Margin of the window at evaluation and inference (the first is used for every side)."""
    mask_thres: tuple[float, ...] = key((0.1,), low=0, high=1)
    """Probability above which a pixel is mask: one value, or one each for small, medium and large boxes."""
    loss_mil_weight: float = key(4.0, low=0)
    """Weight of the multiple-instance loss (the mask fills its box and stays in it)."""
    loss_crf_weight: float = key(0.5, low=0)
    """Weight of the conditional-random-field loss (the mask follows colour edges)."""
    loss_mil_step: int = key(1000, low=0)
    """Steps of the first epoch over which the multiple-instance loss is warmed up."""
    loss_crf_step: int = key(4000, low=0)
    """Steps of the first epoch over which the conditional-random-field loss is warmed up."""
    crf_zeta: float = key(0.1, above=0)
    """Colour distance (in normalised units) that the mean field takes for an edge."""
    crf_kernel_size: int = key(3, low=3, high=15)
    """Side of the mean field's neighbourhood, odd."""
    crf_num_iter: int = key(100, low=1)
    """Iterations of the mean field."""
    crf_size_ratio: float = key(1.0, above=0)
    """Size of the mean field's grid over that of the logits, in training and with use_crf_test."""
    crf_value_high_thres: float = key(0.9, above=0, high=0.999999)
    """Upper clamp of the mean field's probabilities."""
    crf_value_low_thres: float = key(0.1, above=0, high=0.999999)
    """Lower clamp of the mean field's probabilities."""
    crf_shape_weight: float = key(0.0, low=0)
    """Weight of a shape prior before the mean field: the mask is likelier within an ellipse in its box; 0: none."""
    crf_shape_radius: float = key(1.15, above=0)
    """Size of that ellipse: x^2 + y^2 on it, in half-extents of the box."""
    crf_colour_weight: float = key(0.0, low=0)
    """Weight of the crop's colours before the mean field: the object's against the background's; 0: none."""
    crf_colour_zeta: float = key(0.2, above=0)
    """Colour distance (in normalised units) within which these count as alike."""
    crf_rounds: int = key(2, low=1, high=20)
    """How often colours are counted and the mean field is run, with a shape prior or colours; else it runs once."""
    crf_network_weight: float = key(1.0, low=0)
    """Weight of the network's own logits beside the shape prior and the colours."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Keys that evaluation and inference share: the checkpoint, and the pool of actors that runs it."""

    checkpoint: str | None = None
    """Checkpoint with the weights."""
    results_dir: str | None = None
    """Folder of the results; by default <results_dir>/evaluate or /inference."""
    num_gpus: int = key(1, low=1)
    """Actors per node that hold a model: one per GPU, or CPU actors where the cluster has no GPU."""
    gpu_ids: tuple[int, ...] = key((0,), low=0)
    """The GPUs' numbers; when their count and num_gpus disagree the larger wins."""
    min_actors: int = key(1, low=1)
    """Actors that are kept while there is work."""
    max_actors: int = key(0, low=0)
    """Most actors at a time; 0: num_nodes x num_gpus."""
    cpus_per_actor: float = key(1.0, above=0)
    """CPUs that Ray reserves for each actor; also its number of threads on a CPU."""
    decode: str = key("actor", choices=("actor", "nodes"))
    """Where images are decoded: in the actor's threads, or by CPU workers anywhere that ship them to the actors."""
    decode_threads: int = key(0, low=0, high=256)
    """Threads of each actor (or CPU workers for it) that read and decode; 0: one per CPU of the actor, at least two."""
    batch_size: int = key(3, low=1)
    """Boxes per network pass."""
    shard_boxes: int = key(0, low=0)
    """Boxes per shard of work, the grain of resuming; 0: chosen from the input's size."""
    precision: str = key("auto", choices=("auto", "bf16", "fp16", "fp32"))
    """Arithmetic of the network; auto: bf16 where the hardware has it, else fp32."""
    use_teacher_test: bool = False
    """Use the teacher's masks instead of the student's."""
    use_mixed_model_test: bool = False
    """Use the mean of the student's and the teacher's logits."""
    use_flip_test: bool = False
    """Use the mean of the logits of the image and of its mirror image."""
    use_crf_test: bool = False
    """Refine the masks along colour edges by the mean field, with the settings train.crf_*."""
    test_margins: tuple[float, ...] | None = key(None, low=0)
    """Margins of further windows around every box; their probabilities and the first window's are averaged."""
    fill_holes: bool = False
    """Fill the holes of every mask."""
    largest_component: bool = False
    """Keep only the largest component of every mask."""
    min_component_area: int = key(0, low=0)
    """Drop components of fewer pixels from every mask."""
    quality_path: str | None = None
    """A quality.json of `mal evaluate`: calibrates the quality of masks; without it quality only ranks them."""


@dataclass(frozen=True, slots=True)
class EvaluateSpec(PoolSpec):
    """Measuring masks against those of the validation file."""

    detections_path: str | None = None
    """A detector's result list on the validation images: measures the COCO AP of its boxes and of their masks."""
    per_box: str = key("parquet", choices=("parquet", "csv", "both"))
    """How the table of every box's IoU and quality, worst first, is written: boxes.parquet, boxes.csv."""
    comp_clustering: bool = False
    """Kept for old spec files; it must stay false."""


@dataclass(frozen=True, slots=True)
class InferenceSpec(PoolSpec):
    """Labelling: a mask for every box of a file."""

    ann_path: str | None = None
    """COCO file with the boxes, or a detector's result list."""
    images_path: str | None = None
    """COCO file with the images, when ann_path is a detector's result list."""
    img_dir: str | None = None
    """Folder that the file names are relative to."""
    label_dump_path: str | None = None
    """Where the COCO file with the masks goes; by default labels.json in the results folder."""
    label_files: str = key("one", choices=("one", "shards"))
    """One COCO file, or one per shard of work in a folder of that name (without .json), beside one with the rest."""
    load_mask: bool = False
    """Compare with the masks that the input file has: adds `iou` to every annotation."""
    mask_format: str = key("rle", choices=("rle", "polygon"))
    """How masks are written into the COCO file: run-length encoded, or as polygons that agree at IoU 0.99 and more."""
    dump_quality: bool = False
    """Write the estimate of each mask's IoU into the COCO file, as `quality`, instead of the input's own."""
    min_quality: float = key(0.0, low=0, high=1)
    """Masks of lower quality are marked or dropped, and counted in the ledger; 0: none."""
    low_quality: str = key("mark", choices=("mark", "drop"))
    """What happens to them: `"low_quality": true` in the COCO file (the input's own go), or left out of it."""


@dataclass(frozen=True, slots=True)
class RaySpec:
    """How Ray is started on this machine; an existing cluster (RAY_ADDRESS, `ray job submit`) has its own settings."""

    num_cpus: int = key(0, low=0)
    """CPUs to schedule on; 0: all of this machine, at least four."""
    object_store_gb: float = key(1.0, low=0.1)
    """Memory of the object store."""
    autoscaled_cpus: int = key(0, low=0)
    """CPUs that an existing cluster has when its autoscaler has brought all it may; 0: as the cluster says."""
    autoscaled_gpus: int = key(0, low=0)
    """GPUs that an existing cluster has when its autoscaler has brought all it may."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole spec file."""

    results_dir: str = "/results"
    """Folder of all results: a local path, s3:// or gs://; on a cluster one that every node reaches."""
    encryption_key: str | None = field(default=None, repr=False)
    """Key to encrypt checkpoints with; better given as the environment variable MAL_ENCRYPTION_KEY."""
    strategy: str = key("ddp", choices=("ddp", "fsdp"))
    """How training is spread: 'ddp' copies the model to every worker, 'fsdp' shards it."""
    num_nodes: int = key(1, low=1)
    """Nodes for every task; train.num_nodes is the same for training, the larger wins."""
    dataset: DatasetSpec = field(default_factory=DatasetSpec)
    """Data."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """Network."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """Training."""
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    """Evaluation."""
    inference: InferenceSpec = field(default_factory=InferenceSpec)
    """Labelling."""
    ray: RaySpec = field(default_factory=RaySpec)
    """Ray on this machine."""
