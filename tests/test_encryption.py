"""What is encrypted comes back with its key, and with nothing else."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal import encryption
from mal.encryption import MAGIC, is_encrypted, opened, write_encrypted
from mal.errors import CheckpointError


def _sealed(data: bytes, key: str) -> bytes:
    file = io.BytesIO()
    write_encrypted(file, data, key)
    return file.getvalue()


@settings(deadline=None, max_examples=15)
@given(st.binary(max_size=300), st.text(min_size=1, max_size=20), st.integers(1, 64))
def test_round_trip_in_pieces_of_any_size(data, key, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "_PIECE_BYTES", piece)
        sealed = _sealed(data, key)
    assert is_encrypted(sealed)
    assert opened(sealed, key, "x") == data
    if len(data) > 8:
        assert data not in sealed


def test_the_same_data_never_looks_the_same():
    assert _sealed(b"weights", "k") != _sealed(b"weights", "k")


def test_clear_files_are_left_as_they_are():
    assert opened(b"PK\x03\x04", "any", "x") == b"PK\x03\x04"
    assert opened(b"", None, "x") == b""


@pytest.mark.parametrize(("key", "message"), [(None, "MAL_ENCRYPTION_KEY"), ("wrong", "the key is wrong")])
def test_a_missing_or_wrong_key_is_one_clear_error(key, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(_sealed(b"weights" * 100, "right"), key, "model.pth")
    assert "model.pth" in str(caught.value)
    assert "right" not in str(caught.value)


def test_a_cut_or_changed_file_does_not_open(monkeypatch):
    monkeypatch.setattr(encryption, "_PIECE_BYTES", 50)
    sealed = _sealed(bytes(range(160)), "k")
    header = len(MAGIC) + 16
    piece = 4 + 12 + 50 + 16
    cases = {
        "cut after a piece": sealed[: header + 2 * piece],
        "cut in a piece": sealed[:-5],
        "only the header": sealed[:header],
        "changed": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "pieces exchanged": sealed[:header]
        + sealed[header + piece : header + 2 * piece]
        + sealed[header : header + piece]
        + sealed[header + 2 * piece :],
        "more behind": sealed + b"x",
    }
    for name, data in cases.items():
        with pytest.raises(CheckpointError, match=r"cannot be decrypted|ends too early"):
            opened(data, "k", name)
