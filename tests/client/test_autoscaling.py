"""A labelling run on a head without GPUs: its autoscaler brings GPU nodes, they are used, and they go again.

The nodes are Ray's fake ones: raylets on this machine that say they have a GPU. The actors' networks stay on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from head_node import head_node

from mal.data.scenes import write_scenes
from mal.model.network import build_network
from mal.spec.load import load_spec

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

GPU_NODES = 2
SMALL = [
    "dataset.crop_size=32",
    "model.arch=vit-deit-tiny/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "inference.shard_boxes=2",
    "inference.batch_size=2",
    f"inference.max_actors={GPU_NODES}",
    "ray.autoscaled_cpus=4",
    f"ray.autoscaled_gpus={GPU_NODES}",
]

DRIVER = '''
"""Labels with actors that ask for a GPU, and writes down how many GPU nodes there are, every half second."""
import dataclasses, json, sys, threading, time
import ray
from mal.labelling.run import label_file
from mal.labelling.actor import ShardLabeler, load_predictor
from mal.run.status import StatusLog
from mal.run.cluster import connected
from mal.spec.load import load_spec

class OnCpu(ShardLabeler):
    def load(self):
        time.sleep(2)
        return load_predictor(dataclasses.replace(self.task, use_gpu=False))

    def label(self, shard):
        time.sleep(0.4)  # so that the second node comes while there is still work
        return super().label(shard)

def gpu_nodes():
    return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())

def watch():
    while True:
        counts.append(gpu_nodes())
        time.sleep(0.5)

spec, counts = load_spec(None, sys.argv[2:]), []
with connected(spec.ray) as cluster:
    print(cluster)
    threading.Thread(target=watch, daemon=True).start()
    folder, own = spec.results_dir, spec.inference
    run = label_file(spec, own, folder=folder, ann_path=own.ann_path, images_path=None, img_dir=own.img_dir,
                     load_mask=False, status=StatusLog(folder), labeler=OnCpu)
    done = len(counts)
    deadline = time.monotonic() + 150
    while gpu_nodes() and time.monotonic() < deadline:
        time.sleep(1)
    time.sleep(1)
    found = {"counts": counts, "done": done, "actors": run.actors, "shards": len(run.shards)}
    open(sys.argv[1], "w").write(json.dumps(found))
'''


@pytest.fixture(scope="module")
def head():
    folder = Path(tempfile.mkdtemp(prefix="mal"))  # short, for Ray's sockets
    gpu_node = {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": GPU_NODES}
    with head_node(folder, cpus=2, node_types={"gpu": gpu_node}) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def _run(head, script, arguments, results):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": head.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.token_file)}
    command = [sys.executable, str(script), str(results), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_gpu_nodes_come_for_the_work_and_go_after_it(head, tmp_path):
    paths = write_scenes(str(tmp_path), images=24, seed=6, size=(96, 80))
    torch.manual_seed(1)
    torch.save(build_network(load_spec(None, SMALL).model, crop_size=32).state_dict(), tmp_path / "network.pth")
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    inputs = [f"inference.ann_path={paths.annotations}", f"inference.img_dir={paths.images}"]
    arguments = [*inputs, f"inference.checkpoint={tmp_path}/network.pth", f"results_dir={tmp_path}/run", *SMALL]
    ran = _run(head, script, arguments, tmp_path / "found.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "waiting for the autoscaler" in ran.stdout
    assert "GPU actors" in found["actors"]
    assert len(list((tmp_path / "run" / "shards").glob("part-*.parquet"))) == found["shards"]
    during, after = found["counts"][: found["done"]], found["counts"][found["done"] :]
    assert during[0] == 0, "the head has no GPU"
    assert max(during) == GPU_NODES, f"nodes over time: {during}"
    assert after[-1] == 0, f"nodes after the run: {after}"


def test_more_than_the_autoscaler_can_bring_fails_at_once(head, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys\nfrom mal.run.cluster import connected\nfrom mal.run.room import Need\n"
        "from mal.spec.schema import RaySpec\n"
        "with connected(RaySpec(autoscaled_cpus=4, autoscaled_gpus=2)) as cluster:\n"
        "    cluster.check_room(Need('training worker', 3, 1.0, 1.0, 'lower train.num_gpus'))\n"
    )
    ran = _run(head, script, [], tmp_path)
    assert ran.returncode != 0
    assert "3 training workers with 1 CPUs and 1 GPU each can never run" in ran.stderr
    assert "1 GPUs are missing: lower train.num_gpus" in ran.stderr
