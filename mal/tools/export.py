"""``mal export``: a network as ONNX, with any batch size, checked against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mal import storage
from mal.boxes import MEDIUM_UP_TO, SMALL_UP_TO
from mal.errors import CheckpointError, MalError, SpecError
from mal.model.network import BAND_SCALES, MalNetwork, band_of, build_network
from mal.model.weights import load_network, read_checkpoint
from mal.spec.load import load_spec, spec_to_values
from mal.tools.convert import model_of, saved_spec

TOLERANCE = 1e-3
"""Largest difference of a logit between onnxruntime and torch, as a part of the largest logit."""
OPSET = 18
_AREAS = (500.0, 5000.0, 50000.0)
"""One box of each band, in px^2."""


class AllBands(nn.Module):
    """The network without branches that depend on values: every band's scale for every box, then the right one.

    Exact, and slower than `MalNetwork` for boxes that are not large: a graph that is to run any batch cannot sort it.
    """

    def __init__(self, network: MalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, areas: Tensor) -> Tensor:
        """As `MalNetwork.forward`: images [B, 3, S, S] and areas [B] to logits [B, h, w]."""
        network = self.network
        features = network.features(images)
        vectors = network.roi_head(features)
        if not network.adjust_scale:
            return network._logits_at(features, vectors, 1.0) + 0.0 * areas[:, None, None]  # keeps the input
        every = torch.stack([network._logits_at(features, vectors, scale) for scale in BAND_SCALES])
        band = (areas > SMALL_UP_TO).long() + (areas > MEDIUM_UP_TO).long()
        chosen = torch.stack([band == i for i in range(len(BAND_SCALES))])
        return torch.where(chosen[:, :, None, None], every, torch.zeros_like(every)).sum(0)


def export_onnx(
    source: str,
    target: str,
    which: Literal["student", "teacher"] = "student",
    crop_size: int | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Write a network of the checkpoint ``source`` to ``target``. Returns what was loaded and what was measured.

    Args:
        crop_size: side S of the crops; None: that of the checkpoint's spec, else 512.
        overrides: ``model.key=value``, for checkpoints that do not hold their spec.

    Raises:
        SpecError: a wrong override or crop size.
        CheckpointError: the checkpoint cannot be used.
        MalError: the packages for ONNX are not installed, or the export differs from torch.
    """
    _check_packages()
    checkpoint = read_checkpoint(source)
    spec = saved_spec(checkpoint)
    size = crop_size or (spec.dataset.crop_size if spec else 512)
    model = model_of(checkpoint, _model_keys(overrides))
    network = build_network(model, crop_size=size, stem=checkpoint.stem)
    report = load_network(network, checkpoint, which=which, strict=model.strict)
    network.eval()
    if size % network.backbone.stride:
        raise SpecError(f"--crop-size {size}: it must be a multiple of the backbone's stride {network.backbone.stride}")
    data = _to_onnx(network, size, {"architecture": model.arch, "crop_size": str(size), "network": which})
    difference = _difference(data, network, size)
    if not difference <= TOLERANCE:
        raise MalError(f"{source}: exported to ONNX, {model.arch} gives other logits ({difference:.2g} relative)")
    storage.write_bytes(target, data)
    return (
        f"{checkpoint}: {report}\n"
        f"{target}: {which} of {model.arch}, images [B, 3, {size}, {size}] and areas [B] to logits, "
        f"{len(data) / 1e6:.1f} MB; onnxruntime agrees with torch within {difference:.1g} of the largest logit"
    )


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MalError(f"{error}: exporting needs more packages; pip install 'mal-on-ray[export]'") from error


def _model_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """``model.key=value`` as checked values of `ModelSpec`."""
    wrong = [text for text in overrides if not text.startswith("model.")]
    if wrong:
        raise SpecError([f"'{text}': export takes only model.key=value" for text in wrong])
    values = spec_to_values(load_spec(None, overrides))["model"]
    names = {text.partition("=")[0].removeprefix("model.") for text in overrides}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}


def _to_onnx(network: MalNetwork, size: int, about: dict[str, str]) -> bytes:
    """The ONNX file of a network in evaluation mode, weights included, with ``about`` as its metadata."""
    import onnx

    images, areas = torch.zeros(3, 3, size, size), torch.tensor(_AREAS)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with _quiet(), TemporaryDirectory() as folder:
        program = torch.onnx.export(
            AllBands(network).eval(),
            (images, areas),
            dynamo=True,
            input_names=["images", "areas"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: batch}, "areas": {0: batch}},
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        path = Path(folder) / "network.onnx"
        program.save(str(path))
        loaded = onnx.load(str(path))
    onnx.helper.set_model_props(loaded, {**about, "mean": "0.485 0.456 0.406", "std": "0.229 0.224 0.225"})
    try:
        return bytes(loaded.SerializeToString())
    except ValueError as error:
        raise CheckpointError(f"{about['architecture']} is too large for one ONNX file (2 GB)") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's chatter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


@torch.no_grad()
def _difference(data: bytes, network: MalNetwork, size: int) -> float:
    """Largest difference of a logit over the largest logit, for batches of other sizes than the exported one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for bands in ((0, 1, 2, 2), (1,)):
        areas = torch.tensor([_AREAS[band] for band in bands])
        assert band_of(areas).tolist() == list(bands)
        images = torch.randn(len(bands), 3, size, size, generator=generator)
        (found,) = session.run(None, {"images": images.numpy(), "areas": areas.numpy()})
        expected = network(images, areas)
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
    return worst
