"""Finished shards to one COCO JSON: seconds, MB/s and peak memory, in a process of its own.

    python benchmarks/merge_speed.py --rows 10000000
    python benchmarks/merge_speed.py --rows 1000000 --output labels.json.gz
    python benchmarks/merge_speed.py --rows 1000000 --per-shard

The rows are made: boxes of COCO's size, each with an ellipse for a mask; 4096 rows a shard, seven boxes an image.
Printed besides: how fast this disk takes the same number of bytes, flushed, from one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mal import masks, rows
from mal.boxes import Window
from mal.data.index import build_index

SHARD = 4096
HEIGHT, WIDTH = 480, 640
_MASKS = 1000
_MERGE = """
import json, resource, sys, time
from pathlib import Path
from mal.data.index import open_index
from mal.inference.annotations import OutputOptions
from mal.inference.merge import merge
folder, output, per_shard = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
shards = sorted(map(str, Path(folder, "shards").iterdir()))
begun, cpu = time.perf_counter(), time.process_time()
counts = merge(open_index(folder), shards, output, folder + "/ledger.parquet", OutputOptions(per_shard=per_shard))
seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("RESULT", json.dumps({"rows": counts.total, "seconds": seconds, "cpu": cpu, "peak": peak}))
"""


def ellipses(rng: np.random.Generator) -> list[tuple[list[float], str, int]]:
    """Boxes with masks: (bbox, counts, area)."""
    found = []
    for _ in range(_MASKS):
        w, h = (int(side) for side in np.exp(rng.normal(4.2, 0.9, 2)).clip(4, 460))
        x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
        rows_, columns = np.mgrid[:h, :w]
        mask = ((rows_ + 0.5) / h * 2 - 1) ** 2 + ((columns + 0.5) / w * 2 - 1) ** 2 < 1
        counts = masks.encode(mask, Window(x, y, x + w, y + h), HEIGHT, WIDTH)
        found.append(([x + 0.25, y + 0.5, w - 0.5, h - 0.75], counts, int(mask.sum())))
    return found


def write_shards(folder: Path, count: int) -> None:
    """``count`` rows of rows.LABELS in shards, and the index of an input that has no annotation left out."""
    text = json.dumps({"images": [], "annotations": [], "categories": [{"id": k, "name": f"{k}"} for k in range(80)]})
    (folder / "in.json").write_text(text)
    build_index(str(folder / "in.json"), str(folder))
    (folder / "shards").mkdir()
    rng = np.random.default_rng(0)
    made = ellipses(rng)
    for number, first in enumerate(range(0, count, SHARD)):
        ids = np.arange(first, min(first + SHARD, count))
        chosen = [made[k] for k in rng.integers(0, _MASKS, len(ids))]
        known = {
            "position": ids,
            "id": ids + 1,
            "image_id": ids // 7,
            "category_id": rng.integers(0, 80, len(ids)),
            "bbox": [bbox for bbox, _, _ in chosen],
            "clipped": np.zeros(len(ids), bool),
            "file_name": [f"{image:012d}.jpg" for image in (ids // 7).tolist()],
            "height": np.full(len(ids), HEIGHT),
            "width": np.full(len(ids), WIDTH),
            "counts": [counts for _, counts, _ in chosen],
            "area": [area for _, _, area in chosen],
            "quality": rng.random(len(ids)),
            "model": ["0123456789abcdef"] * len(ids),
        }
        columns = [
            pa.array(known[f.name], f.type) if f.name in known else pa.nulls(len(ids), f.type) for f in rows.LABELS
        ]
        table = pa.Table.from_arrays(columns, schema=rows.LABELS)
        pq.write_table(table, folder / "shards" / f"part-{number:06d}.parquet", compression="zstd")


def disk_speed(folder: Path, count: int) -> float:
    """MB/s of plain writes of ``count`` bytes, flushed at the end."""
    block = os.urandom(2**23)
    begun = time.perf_counter()
    with open(folder / "plain", "wb") as file:
        for _ in range(max(1, count // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return count / 1e6 / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", default="labels.json", help="its name; .gz compresses (%(default)s)")
    parser.add_argument("--per-shard", action="store_true", help="one file per shard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mal-merge-") as temporary:
        folder = Path(temporary)
        begun = time.perf_counter()
        write_shards(folder, options.rows)
        print(f"{options.rows:,} rows made in {time.perf_counter() - begun:.0f} s", flush=True)
        output = folder / options.output
        arguments = [str(folder), str(output), "1" if options.per_shard else "0"]
        command = [sys.executable, "-c", _MERGE, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(done.rpartition("RESULT")[2])
        assert found["rows"] == options.rows
        written = [output] if output.is_file() else list((folder / "labels").iterdir())
        size = sum(path.stat().st_size for path in written)
        print(
            f"merged {size / 1e6:,.0f} MB in {len(written)} file(s): {found['seconds']:.1f} s, "
            f"{size / 1e6 / found['seconds']:.0f} MB/s ({size / 1e6 / found['cpu']:.0f} MB per second of CPU), "
            f"{found['cpu'] / options.rows * 1e6:.1f} us of CPU a row, peak {found['peak'] / 1e9:.2f} GB"
        )
        print(f"plain writes to this disk: {disk_speed(folder, min(size, 2**31)):.0f} MB/s")


if __name__ == "__main__":
    main()
