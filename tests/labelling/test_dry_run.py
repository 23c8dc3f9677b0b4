"""``mal inference --dry-run`` tells what would be done, and does nothing."""

from __future__ import annotations

import re

import pytest

from mal.cli import main
from mal.inference.launch import run_inference

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_dry_run_tells_what_is_left_and_how_long_it_takes(line, tmp_path, ray_here, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text("strategy: ddp\n")
    folder = tmp_path / "results"
    command = ["inference", "--dry-run", "-e", str(spec), *line.arguments(folder)]
    assert main(command) == 0
    assert not folder.exists()
    out = capsys.readouterr().out
    total = len(line.document["annotations"])
    assert re.search(rf"annotations in +{total}\n", out)
    assert re.search(rf"boxes to label +{total - 3} ", out)
    assert re.search(r"shards +\d+  \(0 done\)", out)
    assert re.search(r"sample: \d+ boxes, \d+\.\d boxes/s of one actor\ntime: about \d+s, with", out)

    run_inference(line.spec(folder))
    shards = sorted((folder / "shards").iterdir())
    shards[3].unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(rf"shards +{len(shards)}  \({len(shards) - 1} done\)", out)
    assert int(re.search(r"boxes left +(\d+)", out)[1]) <= 6
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert main([*command, "dataset.crop_size=48"]) == 1
    assert "dataset.crop_size: begun with 32, now 48" in capsys.readouterr().err
