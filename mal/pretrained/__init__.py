"""The model that ships with the package: its checkpoint, the settings it needs, and what was measured of it.

    default.json          name, settings and figures
    default.safetensors   student and teacher, trained by `mal train` on boxes alone
    quality.json          the calibration of its masks' quality, as `mal evaluate` writes it
    CARD.md               data, licences, commands, figures, limits

`CHECKPOINT` and `QUALITY` name the two files in a spec wherever it is read: a job finds those of its own package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mal.errors import CheckpointError

CHECKPOINT = "mal:default"
"""In place of a path: the checkpoint of the built-in model."""
QUALITY = "mal:default/quality"
"""In place of a path: its calibration of quality."""

FOLDER = Path(__file__).parent
_FILES = {CHECKPOINT: "default.safetensors", QUALITY: "quality.json"}
_MANIFEST = "default.json"
_NEEDED_FIGURES = ("box_mean_iou", "mIoU", "spearman")


@dataclass(frozen=True)
class DefaultModel:
    """The built-in model."""

    name: str
    checkpoint: Path
    settings: dict[str, Any]
    """Dotted keys of a spec -> values: those that the checkpoint needs, and under ``inference.`` and ``evaluate.`` the
    test-time options that it was measured with."""
    quality: Path
    figures: dict[str, float]
    """What was measured: ``box_mean_iou``, ``mIoU``, ``spearman`` (rank correlation of quality and IoU) and others."""

    def facts(self) -> dict[str, Any]:
        """What a run's summary says of it."""
        return {"name": self.name, "figures": self.figures}

    def __str__(self) -> str:
        figures = self.figures
        return (
            f"the built-in model {self.name} (measured on photographs that it was not trained on: mean IoU "
            f"{figures['box_mean_iou']:.3f} over boxes, {figures['mIoU']:.3f} over classes; its quality ranks masks "
            f"with a correlation of {figures['spearman']:.2f}; more in {self.checkpoint.with_name('CARD.md')})"
        )


def is_built_in(path: str | None) -> bool:
    """Whether ``path`` names a file of the built-in model instead of a place."""
    return path in _FILES


def located(path: str) -> str:
    """The place of the file that ``path`` names: of this installation for `CHECKPOINT` and `QUALITY`, else as it is."""
    return str(FOLDER / _FILES[path]) if path in _FILES else path


def is_there() -> bool:
    """Whether this installation has a built-in model."""
    return (FOLDER / _MANIFEST).is_file()


def default_model() -> DefaultModel:
    """The built-in model.

    Raises:
        CheckpointError: this installation has none, or only a part of it.
    """
    path, checkpoint, quality = FOLDER / _MANIFEST, FOLDER / _FILES[CHECKPOINT], FOLDER / _FILES[QUALITY]
    missing = [file.name for file in (path, checkpoint, quality) if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"the built-in model is incomplete: {', '.join(missing)} not found in {FOLDER}; install the package again, "
            "or give a checkpoint of your own"
        )
    try:
        values = json.loads(path.read_bytes())
        name, settings = str(values["name"]), dict(values["settings"])
        figures = {str(key): float(value) for key, value in values["figures"].items()}
        absent = [key for key in _NEEDED_FIGURES if key not in figures]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not what a built-in model is described by; install the package again"
        ) from error
    if absent:
        raise CheckpointError(f"{path}: the figures lack {', '.join(absent)}; install the package again")
    return DefaultModel(name, checkpoint, settings, quality, figures)
