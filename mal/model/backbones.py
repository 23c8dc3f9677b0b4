"""From an architecture's name to a backbone: images in, one feature map out; and which of its stages are frozen.

Every backbone is an ``nn.Module`` with ``forward(images [B, 3, S, S]) -> features [B, width, S / stride, S / stride]``,
the attributes ``width`` and ``stride`` (`Backbone`), and no classifier. State-dict names are those of the peers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mal.architectures import TIMM_PREFIX, Architecture, get_architecture
from mal.errors import CheckpointError, SpecError

Stem = Literal["patch", "conv"]
Stage = Sequence[nn.Module | nn.Parameter]


class Backbone(nn.Module):
    """What all backbones have in common. A mixin: it stands before the class that holds the layers."""

    width: int
    """Channels of the feature map."""
    stride: int
    """Pixels of the image per pixel of the feature map, along each side."""

    def stages(self) -> list[Stage]:
        """The parts that can be frozen: the patch embedding (or stem), then the blocks in order."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Backbone:
        """As ``nn.Module.train``, but frozen stages stay in evaluation mode: their statistics must not move either."""
        super().train(mode)
        for part in getattr(self, "_frozen_modules", ()):
            part.eval()
        return self


class ConvStem(nn.Module):
    """The research code's patch embedding: four 3x3 stride-2 convs with GroupNorm(1) and GELU, then a 1x1 conv.

    Takes the place of timm's ``PatchEmbed`` with one 16x16 conv; images [B, 3, S, S] -> tokens [B, S/16, S/16, width].
    """

    num_patches = 14 * 14
    grid_size = (14, 14)
    patch_size = (16, 16)

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, width // 8, width // 4, width // 2, width)
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
            parts: list[nn.Module] = [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.GroupNorm(1, c_out), nn.GELU()]
            if i == len(channels) - 2:
                parts.append(nn.Conv2d(c_out, width, 1))
            layers.append(nn.Sequential(*parts))
        self.proj = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)

    def feat_ratio(self) -> int:
        """Pixels per token along one side; timm asks for it."""
        return 16


class VitBackbone(Backbone, VisionTransformer):
    """Plain ViT (Dosovitskiy et al., 2021; DeiT; MAE) by timm, for any square crop that the patch size divides.

    The features are the patch tokens after the final LayerNorm; the class token is dropped there. The absolute
    position embedding is resampled from its 14x14 grid: as timm does it (bicubic, antialiased), or, with the
    convolutional stem, as the released weights were trained (bicubic by the scale factor (n + 0.1) / 14).
    """

    def __init__(self, architecture: Architecture, *, drop_path: float = 0.0, stem: Stem = "patch") -> None:
        if stem == "conv" and architecture.stride != 16:
            raise SpecError(f"model.arch: {architecture.name} has no convolutional stem, its patches are not 16 pixels")
        super().__init__(
            img_size=14 * architecture.stride,
            patch_size=architecture.stride,
            embed_dim=architecture.width,
            depth=architecture.depth,
            num_heads=architecture.heads,
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
        )
        self.width, self.stride, self.stem = architecture.width, architecture.stride, stem
        if stem == "conv":
            self.patch_embed = ConvStem(architecture.width)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, 3, S, S], normalised -> features [B, width, S / stride, S / stride] (channels-last strides)."""
        height, width = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        tokens = self.forward_features(images)[:, 1:]
        return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.stem == "patch":
            return super()._pos_embed(x)
        assert self.pos_embed is not None
        assert self.cls_token is not None
        height, width = x.shape[1:3]
        position = self.pos_embed[:, 1:]
        if (height, width) != (14, 14):
            grid = position.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
            factors = ((height + 0.1) / 14, (width + 0.1) / 14)
            position = F.interpolate(grid, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat((first.expand(len(x), -1, -1), x.flatten(1, 2) + position), dim=1)

    def stages(self) -> list[Stage]:
        loose = [part for part in (self.cls_token, self.pos_embed) if part is not None]
        return [[self.patch_embed, *loose], *([block] for block in self.blocks)]


def build_backbone(
    name: str,
    *,
    crop_size: int = 512,
    drop_path: float = 0.0,
    pretrained: bool = False,
    stem: Stem = "patch",
    feature_stride: int = 16,
) -> Backbone:
    """The backbone called ``name``: one of `mal.architectures.ARCHITECTURES`, or ``timm/<name>``.

    Args:
        crop_size: side of the crops (`dataset.crop_size`), for those timm models that are built for one size.
        drop_path: rate of stochastic depth of the last block; it grows linearly from 0 (`model.vit_dpr`).
        pretrained: fetch timm's public weights (needs the network, or timm's cache).
        stem: ``conv`` builds a ViT with the research code's convolutional stem, to load its released weights.
        feature_stride: of a timm model, the coarsest map that is taken (`model.feature_stride`).

    Raises:
        SpecError: no such architecture, or it has no public weights, or not that stem.
        CheckpointError: the public weights cannot be fetched.
    """
    if name.startswith(TIMM_PREFIX):
        from mal.model.timm_backbone import TimmBackbone

        return TimmBackbone(
            name.removeprefix(TIMM_PREFIX),
            crop_size=crop_size,
            drop_path=drop_path,
            pretrained=pretrained,
            coarsest=feature_stride,
        )
    architecture = get_architecture(name)
    if architecture.family == "vit":
        backbone: Backbone = VitBackbone(architecture, drop_path=drop_path, stem=stem)
    else:
        from mal.model.fan import FanBackbone

        backbone = FanBackbone(architecture, drop_path=drop_path)
    if pretrained:
        _fetch_pretrained(backbone, architecture)
    return backbone


def _fetch_pretrained(backbone: Backbone, architecture: Architecture) -> None:
    if architecture.pretrained is None:
        raise SpecError(
            f"model.pretrained: there are no public weights of {architecture.name} to fetch; "
            "set train.pretrained_model_path to a file of them"
        )
    with explain_fetching(architecture.pretrained, True):
        source = timm.create_model(architecture.pretrained, pretrained=True, num_classes=0)
    backbone.load_state_dict(source.state_dict())


@contextlib.contextmanager
def explain_fetching(name: str, pretrained: bool) -> Iterator[None]:
    """Turn what goes wrong when timm fetches weights into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"model.pretrained: the weights {name} of timm cannot be fetched ({error}); "
            "set train.pretrained_model_path to a local file instead"
        ) from error


def freeze(backbone: Backbone, stages: Sequence[int]) -> None:
    """Take stages out of training (`model.frozen_stages`): no gradient, and evaluation mode for good.

    Args:
        stages: 0 is the patch embedding with class token and position embedding, i the i-th block (from 1 on).
            ``[-1]`` or nothing freezes nothing.

    Raises:
        SpecError: the backbone has no such stage.
    """
    wanted = [stage for stage in stages if stage != -1]
    available = backbone.stages()
    wrong = [stage for stage in wanted if not 0 <= stage < len(available)]
    if wrong:
        raise SpecError(
            f"model.frozen_stages: {wrong} are not stages of this backbone; it has 0 (patch embedding) "
            f"and 1 to {len(available) - 1} (blocks)"
        )
    parts = [part for stage in wanted for part in available[stage]]
    for part in parts:
        part.requires_grad_(False)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    object.__setattr__(
        backbone, "_frozen_modules", modules
    )  # not as submodules: names in the state dict must not change
    backbone.train(backbone.training)
