"""``mal models``: what can be built, with figures taken from the models themselves."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TypedDict

import timm
import torch

from mal.architectures import ARCHITECTURES, TIMM_PREFIX
from mal.errors import SpecError
from mal.model.backbones import Backbone, build_backbone

MOST_LISTED = 200
"""Of timm's models, at most: every one is built, on no device, to be measured."""


class ModelFacts(TypedDict):
    """One line of the list."""

    name: str
    """As in ``model.arch``."""
    parameters: int
    """Of the backbone; the heads add a few millions."""
    stride: int
    """Pixels of the crop per pixel of the feature map."""
    width: int
    """Channels of the feature map."""
    pretrained: str | None
    """Where ``model.pretrained`` fetches weights from; None: give train.pretrained_model_path."""


def describe_models(patterns: Sequence[str] = ()) -> list[ModelFacts]:
    """Facts of the architectures built in, or of all, timm's included, whose name matches one of ``patterns``.

    timm's models without a feature map are left out.

    Raises:
        SpecError: nothing matches, or too many of timm's models do.
    """
    own = [name for name in ARCHITECTURES if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]
    foreign = sorted(
        {
            TIMM_PREFIX + name
            for pattern in patterns
            if pattern.startswith(TIMM_PREFIX)
            for name in timm.list_models(pattern.removeprefix(TIMM_PREFIX))
        }
    )
    if len(foreign) > MOST_LISTED:
        raise SpecError(f"{len(foreign)} models of timm match {' '.join(patterns)}: narrow the pattern")
    facts = [found for name in own + foreign if (found := _facts(name))]
    if not facts:
        raise SpecError(f"no model is called {' or '.join(patterns)}; timm's are spelled {TIMM_PREFIX}<name>")
    return facts


def _facts(name: str) -> ModelFacts | None:
    backbone = _build(name)
    if backbone is None:
        return None
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "stride": backbone.stride,
        "width": backbone.width,
        "pretrained": _weights(name),
    }


def _build(name: str) -> Backbone | None:
    """The backbone without memory for its weights; None if it has no feature map."""
    try:
        with torch.device("meta"):
            return build_backbone(name, crop_size=224)
    except SpecError:
        if name in ARCHITECTURES:
            raise
        return None
    except (RuntimeError, NotImplementedError):  # some compute with values while being built
        return build_backbone(name, crop_size=224)


def _weights(name: str) -> str | None:
    if name in ARCHITECTURES:
        found = ARCHITECTURES[name].pretrained
        return found and f"timm: {found}"
    config = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX), allow_unregistered=False)
    if config is None or not (config.hf_hub_id or config.url):
        return None
    return f"timm: {name.removeprefix(TIMM_PREFIX).partition('.')[0]}.{config.tag}" if config.tag else "timm"


def markdown(models: Sequence[ModelFacts]) -> str:
    """The list as a Markdown table, for the README."""
    lines = ["| `model.arch` | parameters | stride | width | public weights |", "|---|---|---|---|---|"]
    lines += [
        f"| `{model['name']}` | {model['parameters'] / 1e6:.1f} M | {model['stride']} | {model['width']} | "
        f"{model['pretrained'] or 'none in timm: `train.pretrained_model_path`'} |"
        for model in models
    ]
    return "\n".join(lines)


def format_models(models: Sequence[ModelFacts], *, hint: bool) -> str:
    """The list as aligned plain text."""
    width = max(len(model["name"]) for model in models)
    lines = [f"{'model.arch':{width}}  {'parameters':>10}  stride  width  public weights (model.pretrained: true)"]
    lines += [
        f"{model['name']:{width}}  {model['parameters'] / 1e6:>8.1f} M  {model['stride']:>6}  {model['width']:>5}  "
        f"{model['pretrained'] or 'none; give train.pretrained_model_path'}"
        for model in models
    ]
    if hint:
        lines.append(f"Any model of timm with a feature map as {TIMM_PREFIX}<name>; e.g.: mal models 'timm/*dinov3*'")
    return "\n".join(lines)
