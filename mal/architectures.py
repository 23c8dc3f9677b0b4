"""The thirteen architectures of `model.arch` as plain data (METHOD section 3). Imports no torch.

Any other backbone with a feature map is built by timm and spelled ``timm/<name>``; `mal.model.timm_backbone` reads its
width and stride from the model itself.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from mal.errors import SpecError

DEFAULT = "vit-mae-base/16"
TIMM_PREFIX = "timm/"

Family = Literal["vit", "fan", "fan_hybrid"]


@dataclass(frozen=True)
class Architecture:
    """What a backbone is made of."""

    name: str
    family: Family
    width: int
    """Channels of the feature map."""
    heads: int
    depth: int
    """Blocks of the trunk; the class-attention blocks of FAN not counted."""
    stride: int
    """Pixels of the crop per pixel of the feature map, along each side."""
    pretrained: str | None = None
    """The timm model whose public weights `model.pretrained` fetches; None where timm has none."""
    stem_depths: tuple[int, ...] = ()
    """Blocks per stage of the ConvNeXt stem (FAN hybrids)."""


_ALL = (
    Architecture("vit-deit-tiny/16", "vit", 192, 3, 12, 16, "deit_tiny_patch16_224.fb_in1k"),
    Architecture("vit-deit-small/16", "vit", 384, 6, 12, 16, "deit_small_patch16_224.fb_in1k"),
    Architecture("vit-mae-base/16", "vit", 768, 12, 12, 16, "vit_base_patch16_224.mae"),
    Architecture("vit-mae-large/16", "vit", 1024, 16, 24, 16, "vit_large_patch16_224.mae"),
    Architecture("vit-mae-huge/14", "vit", 1280, 16, 32, 14, "vit_huge_patch14_224.mae"),
    Architecture("fan_tiny_12_p16_224", "fan", 192, 4, 12, 16),
    Architecture("fan_small_12_p16_224", "fan", 384, 8, 12, 16),
    Architecture("fan_base_18_p16_224", "fan", 448, 8, 18, 16),
    Architecture("fan_large_24_p16_224", "fan", 480, 10, 24, 16),
    Architecture("fan_tiny_8_p4_hybrid", "fan_hybrid", 192, 8, 8, 16, stem_depths=(3, 3)),
    Architecture("fan_small_12_p4_hybrid", "fan_hybrid", 384, 8, 10, 16, stem_depths=(3, 3)),
    Architecture("fan_base_16_p4_hybrid", "fan_hybrid", 448, 8, 16, 16, stem_depths=(3, 3)),
    Architecture("fan_large_16_p4_hybrid", "fan_hybrid", 480, 10, 22, 16, stem_depths=(3, 5)),
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


def get_architecture(name: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        SpecError: there is none; the message names the nearest names.
    """
    try:
        return ARCHITECTURES[name]
    except KeyError:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(ARCHITECTURES)}"
        message = f"model.arch: {name!r} is not an architecture; {hint} Other backbones are spelled timm/<name>."
        raise SpecError(message) from None
