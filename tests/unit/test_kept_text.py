"""Reports in plain and in packed files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from conformance import kept_text

TEXT = "ä report\n" * 1000


@pytest.mark.parametrize("name", ["report.json", "report.json.gz"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(kept_text.content_of(path, TEXT))
    first = path.read_bytes()
    assert kept_text.read_text(path) == TEXT
    assert (len(first) < 500) == name.endswith(".gz")
    path.write_bytes(kept_text.content_of(path, TEXT))
    assert path.read_bytes() == first


def test_a_packed_file_that_is_cut_off_or_none(tmp_path: Path) -> None:
    path = tmp_path / "report.json.gz"
    path.write_bytes(kept_text.content_of(path, TEXT))
    whole = path.read_bytes()
    for broken in (whole[:-9], b"{}", whole[:20] + b"x" * 30, b""):
        path.write_bytes(broken)
        if broken:
            with pytest.raises(ValueError, match="no whole gzip file"):
                kept_text.read_text(path)
        else:
            assert kept_text.read_text(path) == ""


def test_a_packed_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_text, "MOST_BYTES", 1 << 20)
    path = tmp_path / "report.json.gz"
    path.write_bytes(gzip.compress(bytes((1 << 20) + 1)))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        kept_text.read_bytes(path)
