"""Labelling from and to an S3-compatible store that fails now and then, with credentials that nobody may see."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from labelling_line import ALWAYS_REJECTED, Line, check_account, label_table

from mal import storage
from mal.errors import RunMismatchError
from mal.inference.launch import run_inference
from mal.labelling.task import make_task
from mal.spec.load import load_spec

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "a-secret-that-must-not-be-seen-0123456789"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
FAILURES = 0.05


class Flaky:
    """A WSGI application that answers some requests with 503, as stores do under load."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.failed = 0
        self._moments = random.Random(5)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            fails = self._moments.random() < FAILURES
            self.failed += fails
        if not fails:
            return self.application(environ, start_response)
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


@pytest.fixture(scope="module")
def store() -> Iterator[Flaky]:
    """The store, with a bucket ``labels``; the environment says where it is."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from werkzeug.serving import make_server

    application = Flaky(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
            patch.setenv(name, value)
        address = f"127.0.0.1:{server.server_port}"
        pafs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir("labels")
        yield application
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def remote(store: Flaky, line: Line) -> list[str]:
    """Overrides of a spec whose input lies in the store."""
    for image in line.images.iterdir():
        storage.write_bytes(f"s3://labels/input/images/{image.name}", image.read_bytes())
    for path in (line.annotations, line.checkpoint):
        storage.write_bytes(f"s3://labels/input/{path.name}", path.read_bytes())
    return [
        f"inference.ann_path=s3://labels/input/{line.annotations.name}",
        "inference.img_dir=s3://labels/input/images",
        f"inference.checkpoint=s3://labels/input/{line.checkpoint.name}",
    ]


def _download(uri: str, folder: Path) -> None:
    filesystem, inner = storage.resolve(uri)
    pafs.copy_files(inner, str(folder), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())


def _seen_in(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_labelling_resuming_and_refusing_in_a_store_that_fails_now_and_then(
    line, store, remote, tmp_path, undisturbed, capfd
):
    import ray

    results = "s3://labels/results"
    spec = line.spec(results, *remote)
    run_inference(spec)
    assert store.failed > 10, "the store did not fail"
    _download(results, tmp_path / "first")
    assert check_account(tmp_path / "first", line.document) == ALWAYS_REJECTED
    states = [json.loads(text)["status"] for text in (tmp_path / "first" / "status.json").read_text().splitlines()]
    assert (states[0], states[-1]) == ("STARTED", "SUCCESS")
    assert [{**row, "model": ""} for row in label_table(tmp_path / "first").to_pylist()] == [
        {**row, "model": ""} for row in undisturbed
    ]

    # The same command again does nothing new; of lost work only that is done; another spec is refused.
    storage.delete(f"{results}/shards/part-000001.parquet")
    storage.delete(f"{results}/labels.json")
    run_inference(spec)
    assert re.search(r"; 1 of \d+ shards to do", capfd.readouterr().out)
    _download(results, tmp_path / "second")
    assert label_table(tmp_path / "second").equals(label_table(tmp_path / "first"))
    assert check_account(tmp_path / "second", line.document) == ALWAYS_REJECTED
    with pytest.raises(RunMismatchError, match=r"dataset.crop_size: begun with 32, now 48"):
        run_inference(line.spec(results, *remote, "dataset.crop_size=48"))

    # The credentials are in no log of Ray's, in no result, and were not printed.
    assert _seen_in(tmp_path) == []
    assert _seen_in(Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs") == []
    assert SECRET not in "".join(capfd.readouterr())


def test_a_task_shows_no_credentials(store):
    spec = load_spec(None, [])
    own = {"folder": "/x", "results_dir": "/x", "img_dir": "/x", "checkpoint": "c", "model_id": "m"}
    task = make_task(spec, spec.inference, **own, load_mask=False, gpu=False)
    assert task.environment["AWS_SECRET_ACCESS_KEY"] == os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert SECRET not in repr(task)
