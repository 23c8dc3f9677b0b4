"""Images for a shard, from threads and from CPU workers: in order, bounded in memory, with their errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mal.data.images import ImageError
from mal.errors import ClusterError, StorageError
from mal.labelling import decoding
from mal.labelling.actor import ShardLabeler
from mal.labelling.decoding import CHUNK_BYTES, CHUNK_IMAGES, HELD_BYTES, InThreads, OnNodes, chunks, image_bytes
from mal.labelling.pool import pool_size
from mal.labelling.task import make_task
from mal.run.cluster import Cluster
from mal.run.room import Node
from mal.spec.load import load_spec


def _record(number: int, width: int = 4, height: int = 3) -> dict[str, Any]:
    return {"image_id": number, "file_name": f"{number}.png", "width": width, "height": height}


def _pixels(record: dict[str, Any]) -> NDArray[np.uint8]:
    return np.full((3, 4, 3), record["image_id"], np.uint8)


def test_images_come_in_order_though_they_are_decoded_at_the_same_time():
    def decode(record: dict[str, Any]) -> NDArray[np.uint8]:
        time.sleep(0.02 if record["image_id"] % 3 == 0 else 0.0)
        if record["image_id"] == 5:
            raise ImageError("missing_image", "5.png")
        return _pixels(record)

    with ThreadPoolExecutor(4) as pool:
        found = list(InThreads(pool, decode, 6)(_record(k) for k in range(20)))
    assert [record["image_id"] for record, _ in found] == list(range(20))
    assert found[5][1] == "missing_image: 5.png"
    assert all(found[k][1].max() == k for k in range(20) if k != 5)


def test_large_images_are_not_decoded_ahead_of_need():
    running, most, lock = [0], [0], threading.Lock()

    def decode(record: dict[str, Any]) -> NDArray[np.uint8]:
        with lock:
            running[0] += record["width"] * record["height"] * 3
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        return _pixels(record)

    records = [_record(k, 10_000, 10_000) for k in range(12)] + [_record(k, 20_000, 30_000) for k in range(2)]
    with ThreadPoolExecutor(8) as pool:
        for record, _ in InThreads(pool, decode, 8)(records):
            with lock:
                running[0] -= image_bytes(record)
    assert 2 * image_bytes(records[0]) <= most[0] <= max(HELD_BYTES, image_bytes(records[-1]))


def test_chunks_are_bounded_and_hold_every_record_once():
    sizes = [(640, 480)] * 200 + [(9000, 9000)] + [(1, 1)] * 100
    records = [_record(k, *size) for k, size in enumerate(sizes)]
    parts = list(chunks(records))
    assert [record for part in parts for record in part] == records
    for part in parts:
        assert len(part) <= CHUNK_IMAGES
        assert sum(map(image_bytes, part)) <= CHUNK_BYTES or len(part) == 1


_HUGE = """
    import json, resource, sys
    from concurrent.futures import ThreadPoolExecutor
    import pyarrow as pa, torch
    from PIL import Image
    from mal import rows
    from mal.labelling.shard import label_rows
    from mal.labelling.task import make_task
    from mal.predictor import Predictor
    from mal.spec.load import load_spec
    folder = sys.argv[1]
    spec = load_spec(None, ["dataset.crop_size=64", "inference.batch_size=2"])
    own = dict(folder=folder, img_dir=folder, checkpoint="", model_id="m", load_mask=False, gpu=False)
    task = make_task(spec, spec.inference, **own)
    class Everywhere(torch.nn.Module):
        def forward(self, images, areas):
            return torch.full((len(images), 8, 8), 9.0)
    plain = dict(category_id=1, score=None, clipped=False, segmentation=None, carried=None)
    bboxes = [[[0.0, 0.0, 10_000.0, 10_000.0], [100.0, 100.0, 90.0, 900.0]], [[5000.5, 10.0, 3.0, 4.0]] * 2]
    images = [
        dict(image_id=n, file_name="huge.jpg", width=10_000, height=10_000,
             boxes=[dict(position=2 * n + k, id=2 * n + k, bbox=b, **plain) for k, b in enumerate(bboxes[n > 0])])
        for n in range(int(sys.argv[2]))
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(2) as pool:
        found = label_rows(task, Predictor(Everywhere(), crop_size=64), pool, pa.Table.from_pylist(images, rows.INDEX))
    assert found["reason"].null_count == len(found) == 2 * len(images), found
    assert min(found["area"].to_pylist()) > 0
    print("GREW", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_images_of_a_hundred_megapixels_are_labelled_within_the_stated_memory(tmp_path):
    from PIL import Image

    Image.new("RGB", (10_000, 10_000), (90, 140, 20)).save(tmp_path / "huge.jpg")
    program = tmp_path / "huge.py"
    program.write_text(textwrap.dedent(_HUGE))
    done = subprocess.run([sys.executable, program, tmp_path, "2"], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    grew = int(done.stdout.split("GREW")[1])
    in_threads = 2 * 4 * 10_000 * 10_000  # what the two threads need besides the pixels they give
    largest = 10 * 10_000 * 10_000  # for the window and the mask of a box as large as the image
    assert grew < HELD_BYTES + in_threads + largest


def _cluster(cpus: float) -> Cluster:
    return Cluster(0.0, cpus, False, (Node(cpus, 0.0),))


def test_actors_leave_a_cpu_to_those_who_decode_for_them():
    spec = load_spec(None, ["inference.decode=nodes", "inference.cpus_per_actor=2", "inference.max_actors=8"])
    assert pool_size(spec, spec.inference, _cluster(9), 100).most == 4
    assert pool_size(spec, spec.inference, _cluster(8), 100).most == 3
    assert pool_size(spec, spec.inference, _cluster(100), 100).most == 8
    with pytest.raises(ClusterError, match="a CPU is needed besides those of 1 actors with 2 each, the cluster has 2"):
        pool_size(spec, spec.inference, _cluster(2), 100)


class _Labeler(ShardLabeler):
    """Decodes without files; some images are odd."""

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        number = record["image_id"]
        if number == 3:
            raise ImageError("unreadable_image", "3.png")
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 23:
            raise StorageError("the store is out of reach")
        if number == 24:
            raise ZeroDivisionError("no such luck")
        if number == 33 and not Path(self.task.results_dir, "died").exists():
            Path(self.task.results_dir, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _pixels(record)


@pytest.fixture
def on_nodes(ray_here, tmp_path, monkeypatch):
    from ray import cloudpickle

    monkeypatch.setattr(decoding, "CHUNK_IMAGES", 4)
    spec = load_spec(None, ["inference.decode=nodes"])
    own = {"folder": str(tmp_path), "img_dir": "", "checkpoint": "", "model_id": "m"}
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield OnNodes(_Labeler, make_task(spec, spec.inference, **own, load_mask=False, gpu=False), 2)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_cpu_workers_send_images_in_order_and_one_that_kills_them_is_found(on_nodes):
    numbers = [*range(20), *range(30, 38)]
    found = {record["image_id"]: image for record, image in on_nodes(map(_record, numbers))}
    assert list(found) == numbers
    assert found.pop(3) == "unreadable_image: 3.png"
    assert found.pop(13) == "crashed"
    for number, image in found.items():  # 33 as well, whose worker died once
        np.testing.assert_array_equal(image, _pixels({"image_id": number}))


@pytest.mark.ray
@pytest.mark.parametrize(("number", "error"), [(23, StorageError), (24, ZeroDivisionError)])
def test_errors_of_cpu_workers_come_out_as_they_were(on_nodes, number, error):
    found = on_nodes(map(_record, (20, 21, 22, number)))
    assert [next(found)[0]["image_id"] for _ in range(3)] == [20, 21, 22]
    with pytest.raises(error):
        next(found)
