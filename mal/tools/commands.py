"""The commands ``mal models``, ``mal convert`` and ``mal export``. Loads torch only when one of them runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_tool_commands(commands: Commands) -> None:
    """Add the tools' commands to those of ``mal``."""
    models = commands.add_parser(
        "models",
        help="list the architectures that can be built",
        description="List what model.arch can be: parameters of the backbone, stride, where public weights come from.",
    )
    models.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="names to show, with * and ?: 'fan*', 'timm/*dinov3*'; without any: the architectures built in",
    )
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(run=_models)

    convert = commands.add_parser(
        "convert",
        help="rewrite any checkpoint as safetensors or .pth",
        description="Read any checkpoint that is recognised, safely, and write its weights as safetensors or .pth.",
    )
    convert.add_argument("source", metavar="SRC", help="checkpoint: of this project, of a peer, or of a backbone")
    convert.add_argument("target", metavar="DST", help="file to write: *.safetensors or *.pth")
    convert.add_argument(
        "--part",
        choices=("all", "student", "teacher", "backbone"),
        default="all",
        help="what to keep of the weights (%(default)s)",
    )
    convert.set_defaults(run=_convert)

    export = commands.add_parser(
        "export",
        help="write the student or the teacher as ONNX",
        description="Write a network as ONNX with any batch size, and check it with onnxruntime against torch. "
        "Inputs: images [B, 3, S, S] (RGB, 0..1, normalised with ImageNet's mean and deviation) and areas [B] of the "
        "boxes in px^2. Output: logits [B, h, w]. Needs: pip install 'mal-on-ray[export]'.",
    )
    export.add_argument("source", metavar="SRC", help="checkpoint with the network")
    export.add_argument("target", metavar="DST", help="file to write: *.onnx")
    export.add_argument("--network", choices=("student", "teacher"), default="student", help="which (%(default)s)")
    export.add_argument("--crop-size", type=int, help="side S of the crops; by default the checkpoint's, or 512")
    export.add_argument(
        "overrides", nargs="*", metavar="model.key=value", help="what the checkpoint does not say about its model"
    )
    export.set_defaults(run=_export)


def _models(options: argparse.Namespace) -> None:
    from mal.tools.catalog import describe_models, format_models

    models = describe_models(options.patterns)
    print(json.dumps(models, indent=1) if options.json else format_models(models, hint=not options.patterns))


def _convert(options: argparse.Namespace) -> None:
    from mal.tools.convert import convert

    print(convert(options.source, options.target, options.part))


def _export(options: argparse.Namespace) -> None:
    from mal.tools.export import export_onnx

    print(export_onnx(options.source, options.target, options.network, options.crop_size, options.overrides))
