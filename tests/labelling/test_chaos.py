"""Faults while boxes are labelled. After each: the rows of an undisturbed run, no box twice and none missing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelling_line import ALWAYS_REJECTED, check_account, label_table
from numpy.typing import NDArray

from mal.errors import MalError, StorageError
from mal.inference.launch import run_inference
from mal.labelling.actor import ShardLabeler
from mal.labelling.task import LabelTask

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def actors_of_this_file():
    """Ray sends the classes of this file as they are; its workers could not import them."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def _without(found: list[dict[str, Any]], *image_ids: int) -> list[dict[str, Any]]:
    return [row for row in found if row["image_id"] not in image_ids]


class Slow(ShardLabeler):
    """Leaves its process id in the run's folder, and takes its time."""

    def __init__(self, task: LabelTask) -> None:
        super().__init__(task)
        folder = Path(self.task.shards_folder).parent / "pids"
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).touch()

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        time.sleep(0.25)
        return super().decode(record)


@contextlib.contextmanager
def _killing(pids: Path, kills: int) -> Iterator[list[int]]:
    """Meanwhile, processes that left their ids in ``pids`` are killed, at seeded moments; gives those killed."""
    moments, killed, done = random.Random(7), [], threading.Event()

    def kill() -> None:
        while len(killed) < kills and not done.wait(moments.uniform(0.2, 0.8)):
            alive = [int(p.name) for p in pids.glob("*") if int(p.name) not in killed]
            if alive:
                victim = moments.choice(sorted(alive))
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        done.set()
        killer.join()


def test_actors_killed_again_and_again(line, tmp_path, undisturbed):
    with _killing(tmp_path / "pids", kills=5) as killed:
        run_inference(line.spec(tmp_path), Slow)
    assert len(killed) >= 3
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    assert label_table(tmp_path).to_pylist() == undisturbed


class SlowOnNodes(ShardLabeler):
    """The processes that decode leave their ids in the run's folder, and take their time."""

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        folder = Path(self.task.shards_folder).parent / "pids"
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).touch()
        time.sleep(0.25)
        return super().decode(record)


def test_cpu_workers_that_decode_killed_again_and_again(line, tmp_path, undisturbed):
    with _killing(tmp_path / "pids", kills=5) as killed:
        run_inference(line.spec(tmp_path, "inference.decode=nodes"), SlowOnNodes)
    assert len(killed) >= 3
    assert os.getpid() not in killed
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    assert label_table(tmp_path).to_pylist() == undisturbed


class KilledByImage(ShardLabeler):
    """One image kills the process that decodes it, whatever the process."""

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        if record["image_id"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(record)


def test_an_image_that_kills_its_actor_is_found_and_the_rest_is_labelled(line, tmp_path, undisturbed):
    run_inference(line.spec(tmp_path), KilledByImage)
    lost = len(undisturbed) - len(_without(undisturbed, 5))
    assert check_account(tmp_path, line.document) == {**ALWAYS_REJECTED, "crashed": lost}
    found = label_table(tmp_path).to_pylist()
    assert {row["reason"] for row in found if row["image_id"] == 5} == {"crashed"}
    assert _without(found, 5) == _without(undisturbed, 5)


class RaisingForImages(ShardLabeler):
    """Two images raise errors that are none of an image's usual ones."""

    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        if record["image_id"] == 3:
            raise ZeroDivisionError("no such luck\nsecond line")
        pixels = super().decode(record)
        return pixels.astype(np.float64) if record["image_id"] == 9 else pixels  # trips the predictor


def test_images_that_raise_are_rejected_and_the_rest_is_labelled(line, tmp_path, undisturbed):
    run_inference(line.spec(tmp_path), RaisingForImages)
    lost = len(undisturbed) - len(_without(undisturbed, 3, 9))
    assert check_account(tmp_path, line.document) == {**ALWAYS_REJECTED, "failed": lost}
    found = label_table(tmp_path).to_pylist()
    assert {row["reason"] for row in found if row["image_id"] == 3} == {"failed: ZeroDivisionError: no such luck"}
    assert {row["reason"] for row in found if row["image_id"] == 9} == {"failed: AssertionError: float64"}
    assert _without(found, 3, 9) == _without(undisturbed, 3, 9)


class RaisingForAll(ShardLabeler):
    def decode(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        raise RuntimeError("the library is of another version")


def test_an_error_of_every_image_stops_the_run_with_its_cause(line, tmp_path, undisturbed):
    spec = line.spec(tmp_path)
    with pytest.raises(MalError, match=r"fails for every image.*RuntimeError: the library is of another"):
        run_inference(spec, RaisingForAll)
    assert not list((tmp_path / "shards").glob("part-*"))
    run_inference(spec)  # the library was mended
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    assert label_table(tmp_path).to_pylist() == undisturbed


class SmallDisk(Slow):
    """After two shards no file may grow beyond a few bytes: what a full disk does, to this process alone."""

    def __init__(self, task: LabelTask) -> None:
        super().__init__(task)
        self.labelled = 0

    def label(self, shard: int) -> tuple[int, int]:
        self.labelled += 1
        if self.labelled > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            return super().label(shard)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_stops_the_run_and_the_same_command_goes_on(line, tmp_path, undisturbed):
    with pytest.raises(StorageError, match=os.strerror(errno.EFBIG)) as caught:
        run_inference(line.spec(tmp_path), SmallDisk)
    assert "part-" in str(caught.value), "the file is named"
    states = [json.loads(text) for text in (tmp_path / "status.json").read_text().splitlines()]
    assert states[-1]["status"] == "FAILURE"
    assert os.strerror(errno.EFBIG) in states[-1]["message"]
    assert not list(tmp_path.rglob("*.part"))
    finished = sorted((tmp_path / "shards").glob("part-*"))
    assert finished
    for path in finished:
        assert path.stat().st_size > 1000
    times = [path.stat().st_mtime_ns for path in finished]
    run_inference(line.spec(tmp_path))
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    assert label_table(tmp_path).to_pylist() == undisturbed


NODES_COME_AND_GO = """
    import sys, threading, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    import ray
    sys.path.insert(0, {tests!r})
    from ray import cloudpickle
    import test_chaos
    from mal.inference.launch import run_inference
    from mal.spec.load import load_spec

    def run():
        try:
            run_inference(load_spec(None, {arguments!r}), test_chaos.Slow)
            outcome.append("done")
        except BaseException as error:
            outcome.append(repr(error))

    if __name__ == "__main__":
        cloudpickle.register_pickle_by_value(test_chaos)
        cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=10**8))
        leaving = cluster.add_node(num_cpus=2, object_store_memory=10**8)
        ray.init(address=cluster.address)
        cluster.wait_for_nodes()
        outcome, shards = [], Path({folder!r}) / "shards"
        thread = threading.Thread(target=run)
        thread.start()

        def wait_for(count):
            while thread.is_alive() and len(list(shards.glob("part-*"))) < count:
                time.sleep(0.05)

        wait_for(2)
        cluster.remove_node(leaving, allow_graceful=False)
        removed_at = len(list(shards.glob("part-*")))
        second = cluster.add_node(num_cpus=2, object_store_memory=10**8)
        wait_for(removed_at + 3)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=2, object_store_memory=10**8)
        thread.join()
        print("OUTCOME", outcome, removed_at)
        ray.shutdown()
        cluster.shutdown()
"""


def _own_ray(folder: Path) -> dict[str, str]:
    """The environment of a process with a Ray of its own."""
    temp = folder / "tmp"
    (temp / "ray").mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**environment, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp), "OMP_NUM_THREADS": "1"}


def test_nodes_removed_and_added(line, tmp_path, tmp_path_factory, undisturbed):
    arguments = line.arguments(tmp_path, "inference.cpus_per_actor=1", "inference.max_actors=3")
    tests = str(Path(__file__).parent)
    script = textwrap.dedent(NODES_COME_AND_GO).format(tests=tests, folder=str(tmp_path), arguments=arguments)
    program = tmp_path / "nodes.py"
    program.write_text(script)
    environment = _own_ray(tmp_path_factory.mktemp("r"))
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=400)
    assert "OUTCOME ['done']" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    assert label_table(tmp_path).to_pylist() == undisturbed


def _finished(folder: Path) -> int:
    return len(list((folder / "shards").glob("part-*.parquet")))


def _kill_at(command: subprocess.Popen[bytes], folder: Path, moments: random.Random, late: bool) -> str:
    """SIGKILL the driver: early, at any moment of its start; or late, soon after its first finished shard."""
    before = _finished(folder)
    deadline = time.monotonic() + (240 if late else moments.uniform(0.5, 6.0))
    while time.monotonic() < deadline and command.poll() is None:
        if late and _finished(folder) > before:
            time.sleep(moments.uniform(0.0, 0.6))
            break
        time.sleep(0.02)
    if command.poll() is not None:
        return "had ended"
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    return f"{_finished(folder) - before} shards later" if (folder / "shards").is_dir() else "before the first shard"


def test_drivers_killed_at_ten_random_moments(line, tmp_path, tmp_path_factory, undisturbed):
    """Shards of two boxes in one slow-starting process after another: most kills hit a run at work.

    Early kills, and two of the late ones, take the driver's own Ray with them; the others leave a cluster behind whose
    actors may still be at work when the next driver begins.
    """
    import ray

    arguments = line.arguments(tmp_path, "inference.shard_boxes=2", "inference.max_actors=1", "ray.object_store_gb=0.1")
    spec = tmp_path / "spec.yaml"
    spec.write_text("strategy: ddp\n")
    command = [sys.executable, "-m", "mal.cli", "inference", "-e", str(spec), *arguments]
    own = _own_ray(tmp_path_factory.mktemp("r"))
    shared = {**own, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    moments, ends = random.Random(2026), []
    for kill in range(10):
        late = kill % 2 == 1
        environment = shared if late and kill not in (3, 7) else own
        with open(tmp_path / "driver.log", "ab") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            ends.append(_kill_at(driver, tmp_path, moments, late=late))
    assert "had ended" not in ends, ends
    done = subprocess.run(command, env=shared, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(end[0].isdigit() and end[0] != "0" for end in ends) >= 3, f"too few kills hit a run at work: {ends}"
    assert check_account(tmp_path, line.document) == ALWAYS_REJECTED
    found = label_table(tmp_path).to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in undisturbed]
