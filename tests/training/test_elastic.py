"""Elastic training on a cluster that loses a node and gets another."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_training import TINY

from mal.data.scenes import write_scenes

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 150
"""The longest that a change of the workers may take."""

PROGRAM = """
    import threading, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    import ray
    from mal.spec.load import load_spec
    from mal.training import launch

    FOLDER = Path({folder!r})

    def slow_worker(config):
        "Leaves a file that tells how many workers there are, and takes its time until it may hurry."
        import time
        import torch.distributed as dist
        from mal.training.step import Stepper
        from mal.training.worker import train_worker

        step = Stepper.step

        def slow_step(self, *arguments):
            (FOLDER / f"seen-{{dist.get_world_size()}}").touch()
            if not (FOLDER / "hurry").exists():
                time.sleep(0.4)
            return step(self, *arguments)

        Stepper.step = slow_step
        train_worker(config)

    def run():
        try:
            launch.run_training(load_spec(None, {arguments!r}))
            outcome.append("done")
        except BaseException as error:
            outcome.append(repr(error))

    def wait_for(workers):
        "Until so many are seen at work from now on."
        seen, begun = FOLDER / f"seen-{{workers}}", time.monotonic()
        seen.unlink(missing_ok=True)
        while thread.is_alive() and not seen.exists():
            assert time.monotonic() - begun < {seconds}, f"never {{workers}} workers"
            time.sleep(0.05)
        print("seen", workers, "after", round(time.monotonic() - begun, 1), "s", flush=True)

    if __name__ == "__main__":
        launch.train_worker, launch.RESIZE_SECONDS = slow_worker, 2.0
        cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=10**8))
        leaving = cluster.add_node(num_cpus=1, object_store_memory=10**8)
        ray.init(address=cluster.address)
        cluster.wait_for_nodes()
        outcome = []
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            wait_for(2)
            while thread.is_alive() and not list((FOLDER / "train").glob("*.dcp/training.pth")):
                time.sleep(0.05)
            cluster.remove_node(leaving, allow_graceful=False)
            wait_for(1)
            cluster.add_node(num_cpus=1, object_store_memory=10**8)
            wait_for(2)
        finally:
            (FOLDER / "hurry").touch()
        thread.join({seconds})
        print("OUTCOME", outcome, flush=True)
        ray.shutdown()
        cluster.shutdown()
"""


def test_a_node_is_lost_and_another_comes_and_training_goes_on_to_its_end(tmp_path, tmp_path_factory):
    paths = write_scenes(str(tmp_path / "scenes"), images=28, seed=4, size=(160, 120))
    arguments = [
        *TINY,
        f"dataset.train_ann_path={paths.annotations}",
        f"dataset.train_img_dir={paths.images}",
        "dataset.min_obj_size=100",
        "dataset.num_workers_per_gpu=0",
        f"results_dir={tmp_path}",
        "train.num_gpus=2",
        "train.min_workers=1",
        "train.num_epochs=8",
        "train.batch_size=4",
        "train.checkpoint_interval=10",
        "train.checkpoint_interval_unit=step",
    ]
    program = tmp_path / "elastic.py"
    program.write_text(textwrap.dedent(PROGRAM).format(folder=str(tmp_path), arguments=arguments, seconds=SECONDS))
    temp = tmp_path_factory.mktemp("r")
    (temp / "ray").mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = plain | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(temp),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    }
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=580)
    assert "OUTCOME ['done']" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("seen 2 after") == 2
    last = torch.load(Path(tmp_path, "train", "mal_model_latest.pth"), weights_only=True)
    assert (last["epoch"], last["offset"]) == (8, 0)
