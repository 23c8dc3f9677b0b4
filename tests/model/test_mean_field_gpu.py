"""The Triton kernel against plain torch: in Triton's interpreter, which needs no GPU, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mal.model.mean_field import fastest, plain

_PROGRAM = """
import torch
from mal.model.mean_field import plain
from mal.model.mean_field_gpu import tiled

cases = [  # images, kernel, height, width, boxed, iterations, window
    (1, 3, 9, 12, True, 5, 16),  # several windows, several launches, a rest of an iteration
    (2, 3, 4, 1, True, 2, 16),
    (1, 3, 9, 18, False, 3, 32),
    (1, 5, 9, 4, True, 3, 16),
    (1, 7, 9, 11, False, 1, 16),
]
for seed, (images, kernel_size, height, width, boxed, iterations, window) in enumerate(cases):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 3, height, width, generator=random).to(memory_format=torch.channels_last)
    probabilities = torch.rand(images, height, width, generator=random)
    box = (torch.rand(images, height, width, generator=random) * 1.5).clamp(max=1) if boxed else None
    # Affinities small enough that not all probabilities end at a limit.
    options = dict(kernel_size=kernel_size, zeta=0.5, iterations=iterations, low=0.1, high=0.9)
    expected = plain(image, probabilities, box, **options)
    assert ((expected > 0.11) & (expected < 0.89)).float().mean() > 0.1
    found = tiled(image, probabilities, box, window=window, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    print("equal", seed)
"""


@pytest.mark.slow
def test_interpreted_it_equals_plain_torch() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [word for k in range(5) for word in ("equal", str(k))], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel_size", "side"), [(3, 128), (3, 256), (5, 100), (9, 70)])
def test_on_a_gpu_it_equals_plain_torch(kernel_size: int, side: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert fastest("cuda", kernel_size) is not plain
    random = torch.Generator().manual_seed(side)
    image, probabilities = torch.randn(3, 3, side, side, generator=random), torch.rand(3, side, side, generator=random)
    box = torch.ones(3, side, side)
    options = {"kernel_size": kernel_size, "zeta": 0.3, "iterations": 100, "low": 0.1, "high": 0.9}
    expected = plain(image, probabilities, box, **options)
    q = fastest("cuda", kernel_size)(image.cuda(), probabilities.cuda(), box.cuda(), **options).cpu()
    sure = (expected - 0.5).abs() > 1e-3
    assert ((q > 0.5) == (expected > 0.5))[sure].all()
    torch.testing.assert_close(q, expected, rtol=1e-3, atol=1e-3)
