"""The mask network (backbone, box head, mask head) and the student-teacher pair of it (METHOD section 3).

    images --backbone--> features --resized for the box's band--> mask head --> mask features \\
                             \\--mean over the map--> box head --> box vector --------------------> dot product: logits
"""

from __future__ import annotations

import copy
import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal.boxes import MEDIUM_UP_TO, SMALL_UP_TO
from mal.errors import SpecError
from mal.model.backbones import Backbone, Stem, build_backbone, freeze
from mal.model.enlarged_conv import enlarged_conv, pays

UPSAMPLE_BEFORE = 3
"""The mask head enlarges its map right before the conv of this index (before its last conv if it has fewer)."""
BAND_SCALES = (0.5, 1.0, 2.0)
"""Scale of the feature map for small, medium and large boxes."""
LOGITS_PER_FEATURE = 4
"""Logits per pixel of the feature map, along each side."""
LOGITS_PER_FEATURE_UNADJUSTED = 8


class ModelOptions(Protocol):
    """The section `model` of a spec, as far as the network reads it (METHOD section 6)."""

    @property
    def arch(self) -> str: ...
    @property
    def pretrained(self) -> bool: ...
    @property
    def frozen_stages(self) -> list[int] | tuple[int, ...]: ...
    @property
    def mask_head_num_convs(self) -> int: ...
    @property
    def mask_head_hidden_channel(self) -> int: ...
    @property
    def mask_head_out_channel(self) -> int: ...
    @property
    def not_adjust_scale(self) -> bool: ...
    @property
    def mask_scale_ratio_pre(self) -> float: ...
    @property
    def mask_scale_ratio(self) -> float: ...
    @property
    def vit_dpr(self) -> float: ...
    @property
    def feature_stride(self) -> int: ...


class BoxHead(nn.Module):
    """Mean of the feature map -> Linear -> ReLU -> Linear: what to look for in this box. [B, C, h, w] -> [B, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(width, out)
        self.mlp2 = nn.Linear(out, out)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp2(F.relu(self.mlp1(features.mean(dim=(2, 3)))))


class _ConvReLU(nn.Module):
    """3x3 conv and ReLU; a module of its own only for the peers' names (``convs.0.conv.weight``)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``size``: to which the map is resized first."""
        if size is not None and pays(x, size):
            return enlarged_conv(x, self.conv.weight, self.conv.bias, size).relu_()
        if size is not None:
            x = _resize(x, size)
        return F.relu(self.conv(x.contiguous(memory_format=_layout(x))), inplace=True)


class MaskHead(nn.Module):
    """3x3 convs with ReLU; the map is enlarged by ``scale`` on the way. [B, C, h, w] -> [B, out, scale h, scale w]."""

    def __init__(
        self, width: int, *, num_convs: int = 4, hidden: int = 256, out: int = 256, scale: float = 2.0
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise SpecError(f"model.mask_head_num_convs: {num_convs} is too few; the mask head needs at least one conv")
        channels = [width, *[hidden] * (num_convs - 1), out]
        self.convs = nn.ModuleList(_ConvReLU(c_in, c_out) for c_in, c_out in itertools.pairwise(channels))
        self.scale = scale
        self.upsample_before = min(UPSAMPLE_BEFORE, num_convs - 1)

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``size``: to which the features are resized first."""
        x = features
        for i, conv in enumerate(self.convs):
            wanted = size if i == 0 else None
            if i == self.upsample_before:
                x = x if wanted is None else _resize(x, wanted)
                wanted = scaled_size(x, self.scale)
            x = conv(x, wanted)
        return x


class MalNetwork(nn.Module):
    """Crops in, mask logits out: the student or the teacher.

    Args:
        backbone: gives the feature map.
        num_convs, hidden, out: the mask head's convs, their channels, and the channels of mask features and box vector.
        adjust_scale: run the mask head at a scale that depends on the band of the box (off: `model.not_adjust_scale`).
        scale_pre: further factor on the size of the feature map before the mask head.
        scale: factor by which the mask head enlarges the map.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_convs: int = 4,
        hidden: int = 256,
        out: int = 256,
        adjust_scale: bool = True,
        scale_pre: float = 1.0,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        for key, value in (("mask_scale_ratio_pre", scale_pre), ("mask_scale_ratio", scale)):
            if not value > 0:
                raise SpecError(f"model.{key}: {value} is not a factor; give a number above 0")
        self.backbone = backbone
        self.roi_head = BoxHead(backbone.width, out)
        self.mask_head = MaskHead(backbone.width, num_convs=num_convs, hidden=hidden, out=out, scale=scale)
        self.adjust_scale = adjust_scale
        self.scale_pre = scale_pre

    def forward(self, images: Tensor, areas: Tensor) -> Tensor:
        """Mask logits of crops.

        Args:
            images: [B, 3, S, S], normalised; B at least 1, S a multiple of the backbone's stride.
            areas: [B], areas of the boxes in px^2 of the original image. Best on the CPU: on a GPU, reading them waits
                for the device.

        Returns:
            [B, 4 S / stride, 4 S / stride], float32. (8 S / stride without scale adaptation, as the peers have it.)

        Raises:
            SpecError: the stride does not divide S.
        """
        return self.logits(self.features(images), areas)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's feature map: [B, 3, S, S] -> [B, C, h, w]."""
        if images.shape[-1] % self.backbone.stride or images.shape[-2] % self.backbone.stride:
            stride = self.backbone.stride
            raise SpecError(
                f"dataset.crop_size: {images.shape[-1]} is not a multiple of the backbone's stride {stride}"
            )
        return self.backbone(images)

    def logits(self, features: Tensor, areas: Tensor) -> Tensor:
        """Mask logits from feature maps [B, C, h, w] and areas [B]; boxes of a band share one pass of the mask head."""
        vectors = self.roi_head(features)
        if not self.adjust_scale:
            return self._logits_at(features, vectors, 1.0)
        bands = band_of(areas).tolist()
        members = [[i for i, band in enumerate(bands) if band == wanted] for wanted in range(len(BAND_SCALES))]
        if max(map(len, members)) == len(bands):
            return self._logits_at(features, vectors, BAND_SCALES[bands[0]])
        parts = [
            self._logits_at(features[indices], vectors[indices], scale)
            for indices, scale in zip(members, BAND_SCALES, strict=True)
            if indices
        ]
        order = torch.tensor([i for indices in members for i in indices])
        return torch.cat(parts)[torch.argsort(order).to(features.device)]

    def _logits_at(self, features: Tensor, vectors: Tensor, scale: float) -> Tensor:
        """Logits of boxes of one band, at the common size."""
        height, width = features.shape[-2:]
        masks = self.mask_head(features, scaled_size(features, scale * self.scale_pre))
        logits = torch.einsum("bchw,bc->bhw", masks, vectors).float()  # resized in float32 under autocast, too
        factor = LOGITS_PER_FEATURE if self.adjust_scale else LOGITS_PER_FEATURE_UNADJUSTED
        return _resize(logits[:, None], (factor * height, factor * width))[:, 0]


class StudentTeacher(nn.Module):
    """The student, which is trained, and the teacher, its exponential moving average. Not called itself.

    The teacher starts as a copy of the student, never has gradients, and always is in evaluation mode.
    """

    def __init__(self, student: MalNetwork) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student)
        self.teacher.requires_grad_(False)
        self.teacher.eval()

    def train(self, mode: bool = True) -> StudentTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """``teacher = momentum * teacher + (1 - momentum) * student`` for parameters and float buffers.

        Buffers of whole numbers (batch counters) are copied. Call it after every optimiser step. Works on sharded
        parameters (FSDP2), as both networks are sharded alike.
        """
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)
        averaged: list[tuple[Tensor, Tensor]] = []  # apart from the parameters, which may be shards
        for target, source in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            if target.is_floating_point():
                averaged.append((target, source))
            else:
                target.copy_(source)
        if averaged:
            torch._foreach_lerp_([t for t, _ in averaged], [s for _, s in averaged], 1.0 - momentum)


def build_network(model: ModelOptions, *, crop_size: int = 512, stem: Stem = "patch") -> MalNetwork:
    """The network that the section `model` of a spec describes, frozen stages included.

    Args:
        crop_size: `dataset.crop_size`; only some timm backbones are built for one size.
        stem: ``conv`` for weights of the research code (`mal.model.weights.Checkpoint.stem`).
    """
    backbone = build_backbone(
        model.arch,
        crop_size=crop_size,
        drop_path=model.vit_dpr,
        pretrained=model.pretrained,
        stem=stem,
        feature_stride=model.feature_stride,
    )
    freeze(backbone, model.frozen_stages)
    return MalNetwork(
        backbone,
        num_convs=model.mask_head_num_convs,
        hidden=model.mask_head_hidden_channel,
        out=model.mask_head_out_channel,
        adjust_scale=not model.not_adjust_scale,
        scale_pre=model.mask_scale_ratio_pre,
        scale=model.mask_scale_ratio,
    )


def band_of(areas: Tensor) -> Tensor:
    """Band of each area (0 small, 1 medium, 2 large), as `mal.boxes.band_index` has it."""
    borders = torch.tensor([SMALL_UP_TO, MEDIUM_UP_TO], dtype=areas.dtype, device=areas.device)
    return torch.bucketize(areas, borders)


def scaled_size(x: Tensor, factor: float) -> tuple[int, int]:
    """Height and width of a map times ``factor``, in whole pixels, at least one."""
    return max(1, int(x.shape[-2] * factor)), max(1, int(x.shape[-1] * factor))


def _layout(x: Tensor) -> torch.memory_format:
    """In which layout the mask head's convolutions are fastest: channels-last, which a ViT's tokens are anyway, but for
    float32 on CPUs, where the weights' gradients can take more than twice as long in it (seen without AVX-512)."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return torch.contiguous_format if plain else torch.channels_last


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
