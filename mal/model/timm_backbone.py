"""Any timm model with a feature map as a backbone, spelled ``timm/<name>``, by timm's own feature interface.

The map is the deepest one at most 16 pixels coarse (or `model.feature_stride`), as the heads are made for that; later
layers are cut off. For plain transformers that is the last block, normalised, without class tokens and registers.
State-dict names are timm's, with `PREFIX` in front.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from mal.architectures import TIMM_PREFIX
from mal.errors import SpecError
from mal.model.backbones import Backbone, Stage, explain_fetching

COARSEST = 16
"""Default of the pixels of the image per pixel of the map, at most, where the model offers a choice."""

PREFIX = "model."

_SIZE_OPTIONS = ("dynamic_img_size", "strict_img_size", "img_size")
"""How a timm model is told the size of its images; not every model knows every option, many need none."""


class TimmBackbone(Backbone):
    """A timm model up to one of its feature maps.

    Args:
        name: of the model in timm, with or without a tag of weights.
        crop_size: side of the images, for the models that are built for one size.
        coarsest: pixels of the image per pixel of the map, at most, where the model offers a choice.
        drop_path, pretrained: as `mal.model.backbones.build_backbone`.

    Raises:
        SpecError: timm has no such model, or it has no feature map or no drop path.
        CheckpointError: the public weights cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        *,
        crop_size: int,
        drop_path: float = 0.0,
        pretrained: bool = False,
        coarsest: int = COARSEST,
    ) -> None:
        super().__init__()
        model = _create(name, crop_size, drop_path, pretrained)
        info = _feature_info(model, name)
        index = _deepest_fine_enough([entry["reduction"] for entry in info], coarsest)
        self.normalise = index == len(info) - 1
        channels = info[index]["num_chs"]
        self.width = int(info[index].get("num_chs_norm", channels) if self.normalise else channels)
        self.stride = int(info[index]["reduction"])
        (self.index,) = model.prune_intermediate_layers([index], prune_norm=not self.normalise, prune_head=True)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], normalised -> features [B, width, S / stride, S / stride]."""
        (features,) = self.model.forward_intermediates(
            images, indices=[self.index], norm=self.normalise, output_fmt="NCHW", intermediates_only=True
        )
        return features

    def stages(self) -> list[Stage]:
        """timm's layer groups: the stem, then the blocks; what follows them (the last norm) is no stage."""
        if not hasattr(self.model, "group_matcher"):
            raise SpecError("model.frozen_stages: timm does not say which stages this backbone has; set it to [-1]")
        groups = group_parameters(self.model, self.model.group_matcher(coarse=False))
        parameters = dict(self.model.named_parameters())
        blocks = [[parameters[name] for name in groups[key]] for key in sorted(groups)]
        return [[*stage, *self._owners(stage)] for stage in blocks]

    def _owners(self, parameters: list[nn.Parameter]) -> list[nn.Module]:
        """The layers all of whose own parameters are among these."""
        wanted = {id(parameter) for parameter in parameters}
        owners = []
        for module in self.model.modules():
            own = [id(parameter) for parameter in module.parameters(recurse=False)]
            if own and wanted.issuperset(own) and not any(module.children()):
                owners.append(module)
        return owners


def _create(name: str, crop_size: int, drop_path: float, pretrained: bool) -> Any:
    """timm's model without its classifier, for images of ``crop_size``."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(TIMM_PREFIX + n for n in near)}?" if near else "see timm.list_models()"
        raise SpecError(f"model.arch: timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {"num_classes": 0}
    if drop_path > 0:
        options["drop_path_rate"] = drop_path
    values = {"dynamic_img_size": True, "strict_img_size": False, "img_size": crop_size}
    for choice in (*_SIZE_OPTIONS, None):
        size_option: dict[str, Any] = {choice: values[choice]} if choice else {}
        try:
            with explain_fetching(name, pretrained):
                return timm.create_model(name, pretrained=pretrained, **options, **size_option)
        except TypeError as error:
            if "drop_path_rate" in str(error):
                raise SpecError(f"model.vit_dpr: {TIMM_PREFIX}{name} has no drop path; set it to 0") from error
            if choice is None or choice not in str(error):
                raise
    raise AssertionError("the last choice returns or raises")


def _feature_info(model: Any, name: str) -> list[dict[str, Any]]:
    if not all(hasattr(model, need) for need in ("forward_intermediates", "prune_intermediate_layers", "feature_info")):
        raise SpecError(f"model.arch: timm's {name} has no interface to its feature maps; choose another model")
    info = model.feature_info
    return info.info if hasattr(info, "info") else info


def _deepest_fine_enough(reductions: list[int], coarsest: int) -> int:
    """Index of the coarsest map that is not coarser than ``coarsest``, the last one of several; else of the finest."""
    wanted = max((r for r in reductions if r <= coarsest), default=min(reductions))
    return max(i for i, reduction in enumerate(reductions) if reduction == wanted)
