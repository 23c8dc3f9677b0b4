"""FAN, the fully attentional network (Zhou et al., "Understanding The Robustness in Vision Transformers", ICML 2022).

Written from the paper and from the names of public weights. A block mixes tokens by self-attention, then channels by
channel attention: an MLP with a depth-wise convolution, whose outputs are weighed by one gate per channel. Fourier
position encoding (any crop size); stem of four convolutions, or of two ConvNeXt stages (hybrid). Class attention
(Touvron et al., "Going deeper with Image Transformers", 2021) ends the trunk; what it does to the patch tokens is kept,
the class token itself is not computed: nothing reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models.convnext import ConvNeXtStage
from timm.models.xcit import LPI, ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier
from torch import Tensor, nn

from mal.architectures import Architecture
from mal.model.backbones import Backbone, Stage

NORM_EPSILON = 1e-6
MLP_RATIO = 4
CLASS_BLOCKS = 2
HYBRID_STEM = (128, 256)
"""Channels of the two ConvNeXt stages of the hybrids' stem."""

_norm: Any = partial(nn.LayerNorm, eps=NORM_EPSILON)


class TokenMixing(nn.Module):
    """Multi-head self-attention over tokens [B, N, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ConvMlp(nn.Module):
    """Linear -> plus a depth-wise convolution, scaled per channel -> Linear; tokens of an h x w map [B, N, C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = LPI(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x + self.gamma * self.dwconv(x, height, width))


class ChannelProcessing(nn.Module):
    """Channel attention: the MLP's output times one gate per channel.

    In each head, a channel's gate compares where it is active with where the head's channels are active on average,
    both as distributions over the tokens n:
    ``gate_c = temperature * sigmoid(sum_n softmax_n(q)_nc mean_c softmax_n(x)_nc)``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = nn.Linear(width, width)
        self.mlp_v = ConvMlp(width, MLP_RATIO * width)
        self.norm_v = nn.LayerNorm(width)  # with torch's epsilon, 1e-5, unlike the others

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        where_channel = self.q(x).softmax(dim=1).unflatten(2, (self.heads, -1))
        where_head = x.softmax(dim=1).unflatten(2, (self.heads, -1)).mean(dim=3)
        overlap = torch.einsum("bnhc,bnh->bhc", where_channel, where_head)
        gates = (overlap.sigmoid() * self.temperature[:, 0]).flatten(1)
        return self.norm_v(self.mlp_v(x, height, width)) * gates[:, None]


class FanBlock(nn.Module):
    """Tokens, then channels, each with a residual, layer scale and drop path."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.attn = TokenMixing(width, heads)
        self.norm2 = _norm(width)
        self.mlp = ChannelProcessing(width, heads)
        self.gamma1 = nn.Parameter(torch.ones(width))
        self.gamma2 = nn.Parameter(torch.ones(width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), height, width))


class PatchTokensOfClassAttention(ClassAttentionBlock):
    """Class attention as far as the patch tokens see it: they pass its norms and residuals, not the attention.

    The attention and the MLP act on the class token alone. They are here for their names in state dicts, and are not
    trained: a gradient would never reach them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qkv_bias=True, norm_layer=_norm, tokens_norm=True)
        for part in (self.attn, self.mlp):
            part.requires_grad_(False)
        self.gamma2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm2(x + self.gamma1 * self.norm1(x))


class UnbiasedLayerNorm2d(LayerNorm2d):
    """LayerNorm over the channels of a map [B, C, h, w] that divides by C - 1 for the variance, not by C.

    Public FAN hybrids were trained so: timm's LayerNorm of their time did it for maps in channels-last order, and every
    norm of the stem but the first meets those. Dividing by C moves the features by 0.4 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=1)
        normalised = (x - mean) * torch.rsqrt(variance + self.eps)
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


class HybridStem(nn.Module):
    """ConvNeXt's stem and first two stages, then a 2x2 stride-2 convolution. [B, 3, S, S] -> [B, width, S/16, S/16]."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        norm = partial(UnbiasedLayerNorm2d, eps=NORM_EPSILON)
        first_norm = LayerNorm2d(HYBRID_STEM[0], eps=NORM_EPSILON)
        stem = nn.Sequential(nn.Conv2d(3, HYBRID_STEM[0], 4, 4), first_norm)
        stages = nn.Sequential()
        before = HYBRID_STEM[0]
        for channels, depth, stride in zip(HYBRID_STEM, depths, (1, 2), strict=True):
            stage = ConvNeXtStage(
                before, channels, stride=stride, depth=depth, conv_mlp=True, norm_layer=norm, ls_init_value=1e-6
            )
            stages.append(stage)
            before = channels
        self.backbone = nn.Sequential(OrderedDict(stem=stem, stages=stages))
        self.proj = nn.Conv2d(before, width, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.backbone(images))


class FanBackbone(Backbone):
    """FAN for any crop that 16 divides. Names as in public weights; the classifier is left out."""

    def __init__(self, architecture: Architecture, *, drop_path: float = 0.0) -> None:
        super().__init__()
        width, heads, depth = architecture.width, architecture.heads, architecture.depth
        self.width, self.stride = width, architecture.stride
        if architecture.stem_depths:
            self.patch_embed: nn.Module = HybridStem(width, architecture.stem_depths)
        else:
            self.patch_embed = ConvPatchEmbed(patch_size=architecture.stride, embed_dim=width)
        self.pos_embed = PositionalEncodingFourier(dim=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)  # only a name in state dicts
        rates = (drop_path * i / max(depth - 1, 1) for i in range(depth))
        self.blocks = nn.ModuleList(FanBlock(width, heads, rate) for rate in rates)
        self.cls_attn_blocks = nn.ModuleList(PatchTokensOfClassAttention(width, heads) for _ in range(CLASS_BLOCKS))
        self.norm = _norm(width)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], normalised -> features [B, width, S / 16, S / 16] (channels-last strides)."""
        x = self.patch_embed(images.contiguous())
        if isinstance(self.patch_embed, HybridStem):
            height, width = x.shape[-2:]
            x = x.flatten(2).transpose(1, 2)
        else:
            x, (height, width) = x
        x = x + self.pos_embed(1, height, width).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, height, width)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def stages(self) -> list[Stage]:
        return [[self.patch_embed, self.pos_embed], *([block] for block in self.blocks)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
