"""The table of what is known of each backend: it says what the kept reports say, and the README's is not stale."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conformance.support_matrix import BEGIN, END, HERE, main, markdown, rows, runs_in
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.registry import seed_backends


def check(backend: str, device: str, *outcomes: tuple[str, str], evidence: str = "hardware") -> dict[str, Any]:
    """A report of `fp8moe check`."""
    checks = [
        {"verdict": "computes", "check": "computes.equivalence", "scheme": scheme, "status": status}
        | {"evidence": evidence, "case": f"v1:scheme={scheme},M={number}"}
        for number, (scheme, status) in enumerate(outcomes, 1)
    ]
    selects = {"verdict": "selects", "check": "selects.contract", "status": "passed"}
    versions = {"fp8moe": "0.1.0", "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0"}
    whole = {"format": 1, "origin": backend, "seed": 0, "target": "cuda", "coverage": [], "excluded": []}
    whole |= {"seconds": 1.0, "planned": len(checks), "unshrunk": {}}
    found = {"backend": backend, "level": "quick", "device": device, "versions": versions}
    return whole | found | {"checks": [selects, *checks]}


def twice(report: dict[str, Any]) -> dict[str, Any]:
    return report | {"checks": [*report["checks"], report["checks"][-1]]}


def suite(
    status: str, *, cell: str = "", cases: int = 1, origin: str = "TRITON", evidence: str | None = "hardware"
) -> Any:
    """A report of `pytest conformance`."""
    result = {"verdict": "computes", "check": "computes.equivalence", "scheme": "block", "case": "v1:M=1"}
    result |= {"backend": "TRITON", "status": status, "evidence": evidence}
    told = {"backend": "TRITON", "origin": origin, "scheme": "block", "status": cell or status, "cases": cases}
    return {"format": 1, "cells": [told], "device": {"name": "one"}, "results": [result]}


def kept(folder: Path, **reports: Any) -> Path:
    for name, content in reports.items():
        place = folder / "reports" / name
        place.mkdir(parents=True)
        (place / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "reports"


def rows_of(backend: str, reports: Path) -> list[tuple[str, ...]]:
    return [row[1:] for row in rows(runs_in(reports)) if row[0] == backend]


def test_the_latest_run_on_each_device_stands_there(tmp_path: Path) -> None:
    reports = kept(
        tmp_path,
        **{
            "2026-11-02-new": check("TRITON", "one", ("block", "passed"), ("none", "passed")),
            "2026-11-01-old": check("TRITON", "one", ("block", "failed")),
            "2026-10-01-other": check("TRITON", "two", ("block", "passed"), ("none", "failed"), ("none", "passed")),
            "2026-11-03-simulated": check("TRITON", "none", ("block", "passed"), evidence="simulated"),
        },
    )
    two, one = rows_of("TRITON", reports)
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
    (row,) = rows_of("TRITON", tmp_path / "reports")
    assert row[-2:] == ("2026-11-05", "[reports/2026-11-05-certificate](reports/2026-11-05-certificate)")


def test_what_a_run_left_out_is_told(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed"))
    of = {"verdict": "computes", "check": "computes.equivalence"}
    ran["checks"] += [
        of | {"scheme": "block", "status": "not_run", "case": "v1:M=1"},
        of | {"scheme": "none", "status": "not_run"},
        of | {"scheme": "block", "status": "not_supported", "case": "v1:M=2"},
        of | {"scheme": "none", "status": "not_supported"},
        of | {"scheme": "block", "status": "waived", "case": "v1:M=3", "evidence": "hardware"},
    ]
    told = "quick, incomplete: 1 scheme, 1 check passed, 1 WAIVED, 1 not run, 1 of layers that it does not take"
    assert rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))[0][1] == told


@pytest.mark.parametrize("evidence", ["hardware", None])
@pytest.mark.parametrize("failed", ["computes.fingerprint", "selects.predicate"])
def test_a_failure_without_a_scheme_is_told(tmp_path: Path, failed: str, evidence: str | None) -> None:
    ran = check("TRITON", "one", ("block", "passed"))
    result = {"verdict": failed.partition(".")[0], "check": failed, "status": "failed", "reason": "another"}
    ran["checks"].append(result | ({"evidence": evidence} if evidence else {}))
    ((_, told, *_),) = rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))
    assert told == f"quick: 1 scheme, 1 check passed; FAILED: {failed}"


def test_a_piece_of_a_level_is_no_whole_one(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed")) | {"shard": "3/8"}
    assert rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))[0][1].startswith("quick 3/8: ")


def test_another_class_of_the_same_name_is_no_evidence(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed")) | {"origin": "acme:TRITON"}
    assert rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))[0][0] == "not run"


def test_another_class_of_the_same_name_is_no_evidence_in_a_run_of_the_suite(tmp_path: Path) -> None:
    assert rows_of("TRITON", kept(tmp_path / "ours", **{"2026-11-03": suite("passed")}))[0][0] == "hardware"
    theirs = suite("passed", origin="acme:TRITON")
    assert rows_of("TRITON", kept(tmp_path, **{"2026-11-03": theirs}))[0][0] == "not run"


def test_a_run_of_the_suite_has_the_day_that_its_report_tells(tmp_path: Path) -> None:
    older = suite("passed") | {"date": "2026-11-01T10:00:00+00:00"}
    reports = kept(tmp_path, **{"2026-11-09-moved": older, "2026-11-03": suite("failed")})
    (row,) = rows_of("TRITON", reports)
    assert (row[1], row[3]) == ("suite: 0 schemes, 0 checks passed; FAILED: block", "2026-11-03")
    assert rows_of("TRITON", kept(tmp_path / "alone", **{"2026-11-09-moved": older}))[0][3] == "2026-11-01"


def test_a_run_that_failed_before_anything_was_computed_is_told(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed"))
    contract = {"verdict": "selects", "check": "selects.contract", "status": "failed", "reason": "it does not load"}
    broken = ran | {"checks": [contract], "planned": 0}
    (row,) = rows_of("TRITON", kept(tmp_path, **{"2026-11-03-old": ran, "2026-11-04-new": broken}))
    assert row[:2] == ("hardware", "quick: 0 schemes, 0 checks passed; FAILED: selects.contract")
    unloaded = suite("failed", evidence=None)
    (row,) = rows_of("TRITON", kept(tmp_path / "suite", **{"2026-11-03-old": ran, "2026-11-04-new": unloaded}))
    assert row[1] == "suite: 0 schemes, 0 checks passed; FAILED: block"


def test_a_failure_stands_there_until_as_large_a_run_passes(tmp_path: Path) -> None:
    failed = check("TRITON", "one", ("block", "failed"), ("none", "passed"), ("none", "passed")) | {"level": "certify"}
    small = check("TRITON", "one", ("block", "passed"), ("none", "passed"))
    whole = check("TRITON", "one", ("block", "passed"), ("none", "passed"), ("none", "passed"))
    reports = kept(tmp_path, **{"2026-11-03": failed, "2026-11-04": small})
    assert [row[1] for row in rows_of("TRITON", reports)] == [
        "certify: 1 scheme, 2 checks passed; FAILED: block",
        "quick: 2 schemes, 2 checks passed",
    ]
    kept(tmp_path, **{"2026-11-05": whole})
    assert [row[1] for row in rows_of("TRITON", reports)] == ["quick: 2 schemes, 3 checks passed"]


def test_how_many_checks_of_a_level_were_not_run_is_told(tmp_path: Path) -> None:
    ran = check("TRITON", "one", ("block", "passed")) | {"planned": 1000}
    ran["checks"].append({"verdict": "computes", "check": "computes.graph (pairs)", "status": "not_run"})
    (row,) = rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))
    assert row[1] == "quick, incomplete: 1 scheme, 1 check passed, 999 not run"


def test_a_name_makes_no_row_of_its_own(tmp_path: Path) -> None:
    ran = check("TRITON", "one |\n| TRITON", ("block", "passed"))
    assert "| one \\|\\n\\| TRITON, torch" in markdown(kept(tmp_path, **{"2026-11-03": ran}))


def test_a_file_or_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reports", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: no such folder: --reports names that of the kept runs\n"
    with pytest.raises(SystemExit):
        main(["--reports", str(tmp_path), "--check", str(tmp_path / "README.md")])
    assert "README.md: it cannot be read (FileNotFoundError" in capsys.readouterr().err


def test_a_row_has_the_day_that_its_report_tells_and_the_library_that_was_run(tmp_path: Path) -> None:
    ran = check("MARLIN", "one", ("block", "passed"))
    untold = kept(tmp_path / "untold", **{"2026-11-03": ran})
    assert rows_of("MARLIN", untold)[0][2].startswith("one, a release that the report does not tell, torch")
    ran |= {"date": "2026-11-05T10:00:00+00:00", "code": {"distribution": "vllm", "version": "0.25.1"}}
    ((_, _, on, date, _),) = rows_of("MARLIN", kept(tmp_path, **{"2026-11-03": ran}))
    assert on.startswith("one, vllm 0.25.1, torch")
    assert date == "2026-11-05"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "no report that can be read"),
        (check("TRITON", "one", ("block", "passed")) | {"verdict": "failed"}, "its checks come to 'passed': it was"),
        (check("TRITON", "one", ("block", "failed")) | {"verdict": "passed"}, "its checks come to 'failed': it was"),
        ({"backend": "TRITON", "checks": []}, "no report that can be read"),
        (check("TRITON", "one", ("block", "passed")) | {"format": 2}, "format=2: expected 1"),
        (
            check("TRITON", "one", ("block", "passed")) | {"planned": 9},
            "planned=9, with 1 result and nothing that was",
        ),
        (twice(check("TRITON", "one", ("block", "passed"))), "2 results of 1 check of cases: some are there twice"),
        (
            suite("failed", cell="passed"),
            "cell TRITON, block: status='passed' of 1 cases, and its results have 1 and a",
        ),
        (
            suite("passed", cell="failed"),
            "cell TRITON, block: status='failed' of 1 cases, and its results have 1 and no",
        ),
        (suite("passed", cases=2), "of 2 cases, and its results have 1"),
        (suite("passed") | {"format": None}, "format=None: expected 1"),
        (suite("passed") | {"device": None}, "no report that can be read (TypeError"),
        (suite("passed") | {"results": ["x"]}, "no report that can be read (AttributeError"),
        ("[" * 100_000, "no report that can be read (RecursionError"),
    ],
)
def test_a_report_that_was_changed_or_cannot_be_read_is_told(
    tmp_path: Path, content: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = kept(tmp_path, **{"2026-11-03": content})
    assert main(["--reports", str(reports)]) == 1
    told = capsys.readouterr().err
    assert str(reports / "2026-11-03" / "report.json") in told
    assert why in told


def test_what_was_only_compiled_says_so(tmp_path: Path) -> None:
    result = {"verdict": "compiles", "check": "compiles.sm120.gemm", "status": "passed", "backend": "TRITON"}
    ran = {"format": 1, "cells": [], "device": {"name": "none"}, "results": [result | {"evidence": "compiled"}]}
    assert rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))[0][:2] == (
        "compiled",
        "1 kernel compiled for devices that were not there",
    )


def test_a_run_in_the_interpreter_counts_where_there_is_no_other(tmp_path: Path) -> None:
    ran = check("TRITON", "none", ("block", "passed"), evidence="simulated")
    ((evidence, *_),) = rows_of("TRITON", kept(tmp_path, **{"2026-11-03": ran}))
    assert evidence == "simulated"


def test_without_a_report_it_says_what_there_is(tmp_path: Path) -> None:
    assert rows_of("AITER", tmp_path)[0][0] == "contract"
    assert rows_of("TRITON", tmp_path) == [("not run", "no kept report", "-", "-", "-")]


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
    for between in ("", "\n", "\n\n| old |\n\n"):
        file.write_text(f"before\n{BEGIN}{between}{END}\nafter\n")
        main([*given, "--write", str(file)])
        assert main([*given, "--check", str(file)]) == 0
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
