"""JSON to index against ``pycocotools.COCO``: seconds and peak memory, each in its own process.

python benchmarks/index_speed.py --annotations 500000             polygons of 30 points, as in COCO
python benchmarks/index_speed.py --annotations 10000000 --box-only --no-peer
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES_PER_ANNOTATION = 1 / 7
_BLOCK = 10_000
"""Annotations that differ in more than their ids and images."""

_OURS = """
import sys, time, resource
start = time.perf_counter()
from mal.data.index import build_index
loaded, cpu = time.perf_counter(), time.process_time()
index = build_index(sys.argv[1], sys.argv[2])
assert index.summary.boxes + index.summary.crowd == index.summary.annotations
"""
_PEER = """
import sys, time, resource
start = time.perf_counter()
from pycocotools.coco import COCO
loaded, cpu = time.perf_counter(), time.process_time()
COCO(sys.argv[1])
"""
_REPORT = """
seconds, used = time.perf_counter() - loaded, resource.getrusage(resource.RUSAGE_SELF)
print("RESULT", seconds, used.ru_utime + used.ru_stime - cpu, used.ru_maxrss * 1024)
"""


def write_input(path: Path, annotations: int, box_only: bool) -> None:
    """A COCO file of random boxes (one in a hundred a crowd region), in the layout of COCO's own files."""
    rng = random.Random(0)
    images = max(int(annotations * IMAGES_PER_ANNOTATION), 1)
    with path.open("w") as file:
        file.write('{"info": {"description": "synthetic"}, "images": [')
        for number in range(images):
            record = {"license": 1, "file_name": f"{number:012d}.jpg", "height": 480, "width": 640, "id": number}
            file.write(("," if number else "") + json.dumps(record))
        file.write('], "annotations": [')
        made = [annotation(rng, box_only) for _ in range(min(_BLOCK, annotations))]
        for first in range(0, annotations, _BLOCK):
            count = min(_BLOCK, annotations - first)
            chosen = [rng.randrange(images) for _ in range(count)]
            texts = [f"{head}{chosen[k]}{tail}{first + k + 1}}}" for k, (head, tail) in enumerate(made[:count])]
            file.write(("," if first else "") + ", ".join(texts))
        categories = [{"supercategory": "thing", "id": number, "name": f"class {number}"} for number in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def annotation(rng: random.Random, box_only: bool) -> tuple[str, str]:
    """The text of an annotation with a box inside its image, up to its image's id, and from there to its own."""
    x, y = round(rng.uniform(0, 500), 2), round(rng.uniform(0, 400), 2)
    w, h = round(rng.uniform(2, 639 - x), 2), round(rng.uniform(2, 479 - y), 2)
    polygon = [] if box_only else [[round(rng.uniform(0, 480), 2) for _ in range(60)]]
    mask = {} if box_only else {"segmentation": polygon}
    head = json.dumps({**mask, "area": round(w * h / 2, 4), "iscrowd": int(rng.random() < 0.01)})
    tail = json.dumps({"bbox": [x, y, w, h], "category_id": rng.randint(1, 80)})
    return f'{head[:-1]}, "image_id": ', f', {tail[1:-1]}, "id": '


def measure(script: str, *arguments: str) -> tuple[float, float, float]:
    """Seconds without imports, those of CPU, and peak resident bytes, of a process of its own."""
    command = [sys.executable, "-c", script + _REPORT, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, cpu, peak = map(float, output.split("RESULT", 1)[1].split())
    return seconds, cpu, peak


def line(name: str, found: tuple[float, float, float], size: int) -> str:
    """One process in a line."""
    seconds, cpu, peak = found
    return (
        f"{name:<12} {seconds:7.2f} s  {cpu:7.2f} s of CPU  {peak / 1e9:6.2f} GB   {size / 1e6 / cpu:,.0f} MB/s of CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, default=500_000)
    parser.add_argument("--box-only", action="store_true", help="no polygons")
    parser.add_argument("--no-peer", action="store_true", help="leave pycocotools out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        start = time.perf_counter()
        write_input(path, arguments.annotations, arguments.box_only)
        size = path.stat().st_size
        print(
            f"{arguments.annotations:,} annotations, {size / 1e6:,.0f} MB, made in {time.perf_counter() - start:.0f} s"
        )
        ours = measure(_OURS, str(path), str(Path(folder) / "index"))
        print(line("index", ours, size))
        again = measure(_OURS, str(path), str(Path(folder) / "index"))
        print(line("index again", again, size), "(found by its fingerprint)", flush=True)
        if not arguments.no_peer:
            peer = measure(_PEER, str(path))
            print(line("pycocotools", peer, size))
            ratios = (
                f"{peer[0] / ours[0]:.1f} x, of CPU {peer[1] / ours[1]:.1f} x, {ours[2] / peer[2]:.2f} of the memory"
            )
            print(f"ratio        {ratios}")


if __name__ == "__main__":
    main()
