"""What a run checks of its input before it labels."""

from __future__ import annotations

import pytest

from mal.errors import InputError
from mal.inference.launch import run_inference
from mal.labelling import run


def test_an_input_that_changes_while_it_is_read_is_noticed(line, tmp_path, monkeypatch):
    """Else the results would be of the new content, and the manifest would name the old."""
    annotations = tmp_path / "in.json"
    annotations.write_bytes(line.annotations.read_bytes())
    spec = line.spec(tmp_path / "results", f"inference.ann_path={annotations}")
    build = run.build_index

    def after_a_change(*arguments, **options):
        annotations.write_bytes(line.annotations.read_bytes() + b"\n")
        return build(*arguments, **options)

    monkeypatch.setattr(run, "build_index", after_a_change)
    with pytest.raises(InputError, match=r"in\.json changed while it was read"):
        run_inference(spec)
    assert not (tmp_path / "results" / "index").exists()
    assert not (tmp_path / "results" / "shards").exists()
