"""The certificates that are kept under reports/ hold, whatever the suite has become since they were made."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conformance.certificate.verifying import verify
from conformance.certificate.writing import STATEMENT_FILE

REPORTS = Path(__file__).parents[2] / "reports"
KEPT = sorted(path.parent for path in REPORTS.rglob(STATEMENT_FILE))
MOST_BYTES = 5 << 20
MOST_SECONDS = 10.0


def test_there_is_one_of_a_gpu() -> None:
    assert REPORTS / "h200/2026-11-29-certificate/TRITON" in KEPT or not REPORTS.exists()


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.relative_to(REPORTS).as_posix())
def test_it_holds_without_the_device(folder: Path) -> None:
    begun = time.process_time()
    found = verify(folder)
    took = time.process_time() - begun
    assert found.findings == []
    assert found.verdict == "passed"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    assert took <= MOST_SECONDS
