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

_OURS = """
import sys, time, resource
start = time.perf_counter()
from mal.data.index import build_index
loaded = time.perf_counter()
index = build_index(sys.argv[1], sys.argv[2])
assert index.summary.boxes + index.summary.crowd == index.summary.annotations
"""
_PEER = """
import sys, time, resource
start = time.perf_counter()
from pycocotools.coco import COCO
loaded = time.perf_counter()
COCO(sys.argv[1])
"""
_REPORT = """
seconds = time.perf_counter() - loaded
print("RESULT", seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
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
        for first in range(0, annotations, _BLOCK):
            block = [annotation(rng, n, images, box_only) for n in range(first, min(first + _BLOCK, annotations))]
            file.write(("," if first else "") + json.dumps(block)[1:-1])
        categories = [{"supercategory": "thing", "id": number, "name": f"class {number}"} for number in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def annotation(rng: random.Random, number: int, images: int, box_only: bool) -> dict[str, object]:
    """One annotation with a box inside its image."""
    x, y = round(rng.uniform(0, 500), 2), round(rng.uniform(0, 400), 2)
    w, h = round(rng.uniform(2, 639 - x), 2), round(rng.uniform(2, 479 - y), 2)
    polygon = [] if box_only else [[round(rng.uniform(0, 480), 2) for _ in range(60)]]
    mask = {} if box_only else {"segmentation": polygon}
    rest = {
        "image_id": rng.randrange(images),
        "bbox": [x, y, w, h],
        "category_id": rng.randint(1, 80),
        "id": number + 1,
    }
    return {**mask, "area": round(w * h / 2, 4), "iscrowd": int(rng.random() < 0.01), **rest}


def measure(script: str, *arguments: str) -> tuple[float, float]:
    """Seconds without imports, and peak resident bytes, of a process of its own."""
    command = [sys.executable, "-c", script + _REPORT, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = output.split("RESULT", 1)[1].split()
    return float(seconds), float(peak)


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
        print(f"index        {ours[0]:7.2f} s   {ours[1] / 1e9:6.2f} GB   {size / 1e6 / ours[0]:,.0f} MB/s")
        again = measure(_OURS, str(path), str(Path(folder) / "index"))
        print(f"index again  {again[0]:7.2f} s   {again[1] / 1e9:6.2f} GB   (found by its fingerprint)")
        if not arguments.no_peer:
            peer = measure(_PEER, str(path))
            print(f"pycocotools  {peer[0]:7.2f} s   {peer[1] / 1e9:6.2f} GB")
            print(f"ratio        {peer[0] / ours[0]:7.1f} x   {ours[1] / peer[1]:6.2f} of the memory")


if __name__ == "__main__":
    main()
