"""A 3x3 convolution of a bilinearly enlarged map, without computing it at every pixel of the large map.

Enlarging is linear and works on every channel alike, mixing channels is linear and works on every pixel alike, so they
may change places: the nine matrices of the kernel are applied to the small map, and what they give is enlarged, shifted
by their place in the kernel and added up, one axis after the other. At twice the size that is under half of the
arithmetic, in three matrix products; the result is the same but for rounding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH_IT = 2.0
"""From this ratio of pixels on, large to small map, it is the faster way."""


def pays(x: Tensor, size: tuple[int, int]) -> bool:
    """Whether to do it for a map [B, C, h, w] and a size. On CPUs in float32 only, where arithmetic is what takes time:
    tensor cores and AMX do a convolution faster than the additions go through memory."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False  # an exported network should hold what is written in the paper
    return size[0] * size[1] >= WORTH_IT * x.shape[-2] * x.shape[-1]


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """``conv2d(interpolate(x, size, mode="bilinear"), weight, bias, padding=1)``.

    Args:
        x: [B, C, h, w]; best in channels-last.
        weight: [O, C, 3, 3].
        bias: [O].
        size: height and width of the large map.

    Returns:
        [B, O, *size], in channels-last, with gradients.
    """
    batch, channels, height, width = x.shape
    out = weight.shape[0]
    rows = _shifted(height, size[0], x.dtype).reshape(size[0], 3 * height)  # columns: kernel row, then map row
    columns = _shifted(width, size[1], x.dtype).transpose(1, 2).reshape(size[1], 3 * width)  # map column, kernel column
    pixels = x.permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
    products = pixels @ weight.permute(2, 1, 3, 0).reshape(3, channels, 3 * out)  # [B, 3, h w, 3 O]
    tall = rows @ products.view(batch, 3 * height, width * 3 * out)  # [B, H, w 3 O]
    large = columns @ tall.view(batch * size[0], 3 * width, out)  # [B H, W, O]
    if bias is not None:
        large = large.add_(bias)
    return large.view(batch, *size, out).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
def _shifted(small: int, large: int, dtype: torch.dtype) -> Tensor:
    """[large, 3, small]: what enlarges a line and shifts it by -1, 0 and 1, with zeros beyond its ends."""
    with torch.inference_mode(False), torch.no_grad():  # kept, so it must be fit for training whoever asked first
        line = F.interpolate(torch.eye(small, dtype=dtype)[None], large, mode="linear")[0].T  # [large, small]
        padded = F.pad(line, (0, 0, 1, 1))
        return torch.stack([padded[shift : shift + large] for shift in range(3)], dim=1).contiguous()
