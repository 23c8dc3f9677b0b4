"""Labelling and evaluation on real COCO photographs: every box once, every mask in its box."""

from __future__ import annotations

import json

import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mal import boxes
from mal.cli import main
from mal.model.network import StudentTeacher, build_network
from mal.spec.load import load_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(600)]

MODEL = ["dataset.crop_size=64", "model.arch=vit-deit-tiny/16", "model.mask_head_hidden_channel=16"]


def test_every_box_of_coco_is_labelled_once_and_its_mask_stays_in_its_box(shared_dir, tmp_path, ray_here, capsys):
    torch.manual_seed(0)
    spec = load_spec(None, MODEL)
    state = StudentTeacher(build_network(spec.model, crop_size=64)).state_dict()
    checkpoint = tmp_path / "untrained.pth"
    torch.save({"state_dict": state}, checkpoint)
    (tmp_path / "spec.yaml").write_text("{}\n")
    annotations, images = shared_dir / "coco/val/instances.json", shared_dir / "coco/val/images"
    arguments = ["-e", str(tmp_path / "spec.yaml"), f"results_dir={tmp_path}", *MODEL]
    data = [f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}"]
    assert main(["evaluate", *arguments, *data, f"evaluate.checkpoint={checkpoint}"]) == 0
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert metrics["counts"] == {"boxes": 1020, "small": 293, "medium": 389, "large": 338}

    files = [f"inference.ann_path={annotations}", f"inference.img_dir={images}", "inference.load_mask=true"]
    assert main(["inference", *arguments, *files, f"inference.checkpoint={checkpoint}"]) == 0
    given, found = COCO(str(annotations)), COCO(str(tmp_path / "inference" / "labels.json"))
    assert set(found.anns) == set(given.anns)
    assert len(found.dataset["annotations"]) == 1020 + 11
    ious = []
    for key, annotation in found.anns.items():
        image = given.imgs[annotation["image_id"]]
        if given.anns[key]["iscrowd"]:
            assert annotation == given.anns[key]
            continue
        assert annotation["bbox"] == given.anns[key]["bbox"]
        mask = coco_mask.decode(annotation["segmentation"])
        assert mask.shape == (image["height"], image["width"])
        box = boxes.clip(boxes.from_xywh(annotation["bbox"]), image["width"], image["height"])
        window = boxes.outer_pixels(box, image["width"], image["height"])
        assert mask[window.y0 : window.y1, window.x0 : window.x1].sum() == mask.sum() == annotation["area"]
        ious.append(annotation["iou"])
    assert sum(ious) / len(ious) == pytest.approx(metrics["box_mean_iou"], abs=1e-9)
