"""The model that really ships: its files fit together, and its card says what its figures say."""

from __future__ import annotations

import numpy as np

from mal import pretrained
from mal.boxes import Box
from mal.labelling.actor import load_predictor
from mal.labelling.task import file_fingerprint, make_task
from mal.predictor import BoxItem
from mal.spec.load import load_spec


def test_it_loads_and_finds_a_disc_in_its_box(tmp_path):
    spec = load_spec(None, [], "inference")
    assert spec.inference.checkpoint == pretrained.CHECKPOINT
    task = make_task(
        spec,
        spec.inference,
        folder=str(tmp_path),
        img_dir=str(tmp_path),
        checkpoint=pretrained.CHECKPOINT,
        model_id=file_fingerprint(pretrained.CHECKPOINT),
        load_mask=False,
        gpu=False,
    )
    y, x = np.mgrid[:120, :160]
    disc = np.hypot(y - 60, x - 80) < 40
    image = np.where(disc[..., None], (200, 60, 40), (60, 120, 90)).astype(np.uint8)
    (result,) = load_predictor(task).predict([BoxItem(image, Box(40, 20, 120, 100))])
    assert abs(result.area / disc.sum() - 1) < 0.12
    assert result.agreement is not None


def test_its_card_has_its_figures_and_it_is_small():
    model = pretrained.default_model()
    card = model.checkpoint.with_name("CARD.md").read_text()
    assert model.name in card
    for name in ("box_mean_iou", "mIoU"):
        assert f"**{model.figures[name]:.3f}**" in card
    assert f"{model.figures['spearman']:.2f} with classes" in card
    assert model.checkpoint.stat().st_size < 20e6
