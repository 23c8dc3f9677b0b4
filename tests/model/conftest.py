"""Small networks for the tests of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mal.architectures import Architecture
from mal.model.backbones import VitBackbone
from mal.model.network import MalNetwork

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture
def tiny_network() -> MalNetwork:
    """A network of a few thousand parameters with two ViT blocks; stride 16."""
    torch.manual_seed(0)
    backbone = VitBackbone(Architecture("tiny", "vit", 16, 2, 2, 16))
    return MalNetwork(backbone, hidden=8, out=8).eval()


@pytest.fixture(scope="session")
def reference(shared_dir: Path) -> Reference:
    return Reference(shared_dir / "reference")


class Reference:
    """The peer's numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> Any:
        return torch.load(self.folder / name, weights_only=True)

    def crops(self, name: str) -> Tensor:
        """Normalised crops [3, 3, S, S]."""
        pixels = self.load("model_inputs.pt")[name]["image_u8"].permute(0, 3, 1, 2)
        return ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).contiguous()
