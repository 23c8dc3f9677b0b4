"""Where images are decoded: in the threads of the actor that labels them, or by CPU workers anywhere in the cluster.

Both give the images of a shard in order, a few ahead of who asks, and hold a bounded number of bytes. What is shipped
between nodes are decoded images, never crops: these overlap, and a box's crop is larger than its share of the image.

CPU workers are Ray tasks that the actor itself asks for, some images each, and not a stage of Ray Data in front of the
actors. A block of such a stage could reach any actor, while a shard has one owner, which writes it at once and keeps
the account of attempts at it; and no stage can starve another of CPUs (`mal.labelling.pool` leaves some free).
"""

from __future__ import annotations

import functools
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mal.data import images
from mal.errors import ClusterError
from mal.labelling.task import LabelTask

HELD_BYTES = 2**30
"""Decoded images that wait take about this much in an actor; a single image may be larger. While it is decoded, an
image takes four bytes a pixel besides its own three; a box as large as its image takes about ten bytes a pixel more
while its crop and its mask are made (measured, 100 megapixels)."""
CHUNK_BYTES = 2**25
"""Decoded images that one task of a CPU worker returns; a single image may be larger."""
CHUNK_IMAGES = 32
"""At most so many images in one task."""
WORKER_RETRIES = 2
"""How often Ray runs the task of a CPU worker again that died."""
_NODES_LOST = 20
"""How many lost nodes one task may survive."""

Record = dict[str, Any]
"""``image_id``, ``file_name``, ``width`` and ``height`` of a row of rows.INDEX."""
Decode = Callable[[Record], NDArray[np.uint8]]
"""A record -> its image as RGB [H, W, 3] of the size in the record. Raises ImageError."""
Decoded = NDArray[np.uint8] | str
"""An image, or the reason why there is none."""


class Images(Protocol):
    """Gives the images of records."""

    def __call__(self, records: Iterable[Record]) -> Iterator[tuple[Record, Decoded]]:
        """Each record with its image, in order. What decoding raises besides ImageError comes out here."""


def decode_image(task: LabelTask, record: Record) -> NDArray[np.uint8]:
    """The image of a record, read from ``task.img_dir``. Raises ImageError."""
    path = images.safe_join(task.img_dir, record["file_name"])
    expected = (record["width"], record["height"])
    return images.decode(path, expected=expected, max_pixels=task.max_image_pixels, folder=task.img_dir)


def image_bytes(record: Record) -> int:
    """Bytes of the decoded image."""
    return 3 * int(record["width"]) * int(record["height"])


def _tried(decode: Decode, record: Record) -> Decoded:
    try:
        return decode(record)
    except images.ImageError as error:
        return error.reason


class InThreads:
    """Images decoded by the threads of this process.

    Args:
        ahead: images that are decoded ahead of who asks, as far as HELD_BYTES allows.
    """

    def __init__(self, pool: ThreadPoolExecutor, decode: Decode, ahead: int) -> None:
        self._pool, self._decode, self._ahead = pool, decode, ahead

    def __call__(self, records: Iterable[Record]) -> Iterator[tuple[Record, Decoded]]:
        left = deque(records)
        running: deque[tuple[Record, Future[Decoded]]] = deque()
        held = 0
        try:
            while left or running:
                while left and len(running) <= self._ahead:
                    size = image_bytes(left[0])
                    if running and held + size > HELD_BYTES:
                        break
                    held += size
                    record = left.popleft()
                    running.append((record, self._pool.submit(_tried, self._decode, record)))
                record, future = running.popleft()
                held -= image_bytes(record)
                yield record, future.result()
        finally:
            for _, future in running:
                future.cancel()


class OnNodes:
    """Images decoded by CPU workers of the cluster, and sent through Ray's object store.

    A worker that dies is replaced; images that were with it are tried again, at last each by itself, and one that
    keeps killing its worker gets the reason ``crashed``.

    Args:
        labeler: has a class method ``decoder(task)`` that gives a Decode.
        ahead: tasks that run ahead of who asks, as far as HELD_BYTES allows.
    """

    def __init__(self, labeler: Any, task: LabelTask, ahead: int) -> None:
        import ray

        self._ahead = ahead
        self._shared = ray.put((labeler, task))
        self._remote = ray.remote(num_cpus=1, num_gpus=0, max_retries=WORKER_RETRIES)(decode_chunk)

    def __call__(self, records: Iterable[Record]) -> Iterator[tuple[Record, Decoded]]:
        import ray

        left = deque(chunks(records))
        running: deque[tuple[list[Record], Any]] = deque()
        held = 0
        try:
            while left or running:
                while left and len(running) <= self._ahead:
                    size = sum(map(image_bytes, left[0]))
                    if running and held + size > HELD_BYTES:
                        break
                    held += size
                    chunk = left.popleft()
                    running.append((chunk, self._remote.remote(self._shared, chunk)))
                chunk, reference = running.popleft()
                held -= sum(map(image_bytes, chunk))
                for record, found in zip(chunk, self._found(chunk, reference), strict=True):
                    if isinstance(found, Exception):
                        raise found
                    yield record, found
                del reference, found  # or they would hold the images while the next ones are waited for
        finally:
            for _, reference in running:
                ray.cancel(reference)

    def _found(self, chunk: list[Record], reference: Any) -> Sequence[Decoded | Exception]:
        """What the task of ``chunk`` returned; what kills its worker is found image by image."""
        import ray

        for _ in range(_NODES_LOST):
            try:
                found: Sequence[Decoded | Exception] = ray.get(reference)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                if len(chunk) == 1:
                    return ["crashed"]
                return [self._found([record], self._remote.remote(self._shared, [record]))[0] for record in chunk]
            except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
                reference = self._remote.remote(self._shared, chunk)
            except ray.exceptions.RayError as error:
                raise ClusterError(f"the CPU workers that decode images cannot be reached: {error}") from error
            else:
                return found
        raise ClusterError(f"{_NODES_LOST} nodes were lost while they decoded {chunk[0]['file_name']!r}")


def decode_chunk(shared: tuple[Any, LabelTask], records: Sequence[Record]) -> list[Decoded | Exception]:
    """What a CPU worker does: the images, or why there is none; errors are returned, each in its image's place."""
    labeler, task = shared
    os.environ.update(task.environment)
    decode = functools.partial(_tried, labeler.decoder(task))
    found: list[Decoded | Exception] = []
    for record in records:
        try:
            found.append(decode(record))
        except Exception as error:  # noqa: BLE001  whatever an image may cause; raised again by the actor
            found.append(_sendable(error))
    return found


def _sendable(error: Exception) -> Exception:
    """``error``, as something that can be sent to another process whatever it holds."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  classes of others may do anything here
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Successive records whose decoded images take at most CHUNK_BYTES together."""
    chunk: list[Record] = []
    held = 0
    for record in records:
        size = image_bytes(record)
        if chunk and (held + size > CHUNK_BYTES or len(chunk) == CHUNK_IMAGES):
            yield chunk
            chunk, held = [], 0
        chunk.append(record)
        held += size
    if chunk:
        yield chunk
