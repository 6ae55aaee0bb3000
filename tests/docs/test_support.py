"""The table of what is known of each backend: it says what the kept reports say, and the README's is not stale."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conformance.support_matrix import BEGIN, END, HERE, main, rows, runs_in
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.registry import seed_backends


def check(backend: str, device: str, *outcomes: tuple[str, str], evidence: str = "hardware") -> dict[str, Any]:
    """A report of `fp8moe check`."""
    checks = [{"scheme": scheme, "status": status, "evidence": evidence} for scheme, status in outcomes]
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    return {"backend": backend, "level": "quick", "device": device, "versions": versions, "checks": checks}


def kept(folder: Path, **reports: Any) -> Path:
    for name, content in reports.items():
        place = folder / "reports" / name
        place.mkdir(parents=True)
        (place / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "reports"


def of(backend: str, reports: Path) -> list[tuple[str, ...]]:
    return [row[1:] for row in rows(runs_in(reports)) if row[0] == backend]


def test_the_latest_run_on_each_device_stands_there(tmp_path: Path) -> None:
    reports = kept(
        tmp_path,
        **{
            "2026-11-02-new": check("TRITON", "one", ("block", "passed"), ("none", "passed")),
            "2026-11-01-old": check("TRITON", "one", ("block", "failed")),
            "2026-10-01-other": check("TRITON", "two", ("block", "passed"), ("none", "failed"), ("none", "passed")),
            "2026-11-03-simulated": check("TRITON", "none", ("block", "passed"), evidence="simulated"),
            "2026-11-04-broken": "{",
        },
    )
    two, one = of("TRITON", reports)
    link = "[reports/{0}](reports/{0})"
    assert one[:2] == ("hardware", "quick: 2 schemes, 2 checks passed")
    assert one[2:] == ("one, torch 2.11.0, triton 3.6.0", "2026-11-02", link.format("2026-11-02-new"))
    assert two[1] == "quick: 1 scheme, 2 checks passed; FAILED: none"


def test_a_certificate_counts_by_its_evidence(tmp_path: Path) -> None:
    place = kept(tmp_path) / "2026-11-05-certificate" / "TRITON"
    place.mkdir(parents=True)
    (place / "evidence.json.gz").write_bytes(
        gzip.compress(json.dumps({"edition": "2026.1", "report": check("TRITON", "one", ("block", "passed"))}).encode())
    )
    (row,) = of("TRITON", tmp_path / "reports")
    assert row[-2:] == ("2026-11-05", "[reports/2026-11-05-certificate](reports/2026-11-05-certificate)")


def test_what_a_run_left_out_is_told(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed"))
    ran["checks"] += [
        {"scheme": "block", "status": "not_run", "case": "v1:M=1"},
        {"scheme": "none", "status": "not_run"},
        {"scheme": "block", "status": "not_supported", "case": "v1:M=2"},
        {"scheme": "none", "status": "not_supported"},
        {"scheme": "block", "status": "waived", "case": "v1:M=3", "evidence": "hardware"},
    ]
    told = "quick: 1 scheme, 1 check passed, 1 WAIVED, 1 not run, 1 of layers that it does not take"
    assert of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))[0][1] == told


def test_a_run_in_the_interpreter_counts_where_there_is_no_other(tmp_path: Path) -> None:
    ran = check("TRITON", "none", ("block", "passed"), evidence="simulated")
    ((evidence, *_),) = of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))
    assert evidence == "simulated"


def test_without_a_report_it_says_what_there_is(tmp_path: Path) -> None:
    assert of("AITER", tmp_path)[0][0] == "contract"
    assert of("TRITON", tmp_path) == [("not run", "no kept report", "-", "-", "-")]


def test_a_stale_table_is_told_and_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{BEGIN}\n| old |\n{END}\nafter\n")
    given = ["--reports", str(tmp_path)]
    assert main([*given, "--check", str(file)]) == 1
    assert f"--write {file}" in capsys.readouterr().err
    assert main([*given, "--write", str(file)]) == 0
    assert main([*given, "--check", str(file)]) == 0
    assert file.read_text().startswith("before\n")
    assert file.read_text().endswith("after\n")
    file.write_text("no marks")
    with pytest.raises(SystemExit):
        main([*given, "--check", str(file)])


def test_the_readmes_table_is_what_the_reports_say() -> None:
    if not (HERE / "reports").is_dir():
        pytest.skip("a source distribution has no kept runs")
    assert main(["--check", str(HERE / "README.md")]) == 0


def test_an_adapter_says_that_it_was_tried_where_a_report_says_so() -> None:
    if not (HERE / "reports").is_dir():
        pytest.skip("a source distribution has no kept runs")
    found = {row[0]: row[1] for row in rows(runs_in(HERE / "reports"))}
    libraries = {
        spec.name: spec.experts_cls for spec in seed_backends() if issubclass(spec.experts_cls, LibraryBackend)
    }
    tried = {name: bool(cls.tried_on) for name, cls in libraries.items()}
    assert tried == {name: found[name] == "hardware" for name in tried}
