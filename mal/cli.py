"""The command ``mal``: parse, load the spec, call the task.

Exit codes: 0 done, 1 failed, 2 a wrong spec or command, 3 paused.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from mal import __version__
from mal.client.commands import add_job_commands
from mal.encryption import ENVIRONMENT as ENCRYPTION_KEY
from mal.errors import MalError
from mal.spec.derived import Action
from mal.spec.schema import Spec
from mal.tools.commands import add_tool_commands

_EPILOG = """\
Any key of the spec can be given on the command line: mal train -e spec.yaml train.lr=1e-5 dataset.crop_size=256
Ray starts on this machine, or is the cluster that RAY_ADDRESS names.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. The outermost frame of the process."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MalError as error:
        print(f"mal {options.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mal {options.command}: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mal", description="Mask Auto-Labeler: from boxes to masks, on Ray.")
    parser.add_argument("--version", action="version", version=f"mal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tasks: dict[str, tuple[str, Callable[[argparse.Namespace], None]]] = {
        "train": ("learn masks from boxes", _train),
        "evaluate": ("measure a checkpoint against the masks of a file", _evaluate),
        "inference": ("make a mask for every box of a file", _inference),
    }
    for name, (text, run) in tasks.items():
        task = commands.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        task.add_argument("-e", "--experiment_spec", metavar="SPEC", help="the spec file (YAML); else all defaults")
        task.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the spec's")
        task.set_defaults(run=run)
    commands.choices["inference"].add_argument(
        "--dry-run", action="store_true", help="print what would be done and how long it might take, and do nothing"
    )
    demo = commands.add_parser(
        "demo",
        help="render scenes, learn from their boxes, label and show the masks; a few minutes on two CPU cores",
        description="Render scenes, train a small model on their boxes, evaluate it, label the validation boxes.",
    )
    demo.add_argument("--results-dir", default="results/demo", help="folder of everything the demo makes (%(default)s)")
    demo.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the demo's spec")
    demo.set_defaults(run=_demo)
    add_tool_commands(commands)
    add_job_commands(commands)
    return parser


def _load(options: argparse.Namespace, action: Action) -> Spec:
    from mal.spec.load import load_spec

    spec = load_spec(options.experiment_spec, options.overrides, action)
    key = os.environ.get(ENCRYPTION_KEY)
    return dataclasses.replace(spec, encryption_key=key) if key and not spec.encryption_key else spec


def _train(options: argparse.Namespace) -> None:
    spec = _load(options, "train")
    from mal.training.launch import run_training

    run_training(spec)


def _evaluate(options: argparse.Namespace) -> None:
    spec = _load(options, "evaluate")
    from mal.evaluation.launch import run_evaluation

    run_evaluation(spec)


def _inference(options: argparse.Namespace) -> None:
    spec = _load(options, "inference")
    if options.dry_run:
        from mal.inference.plan import plan_inference

        plan_inference(spec)
        return
    from mal.inference.launch import run_inference

    run_inference(spec)


def _demo(options: argparse.Namespace) -> None:
    from mal.demo import run_demo

    run_demo(options.results_dir, options.overrides)


if __name__ == "__main__":
    sys.exit(main())
