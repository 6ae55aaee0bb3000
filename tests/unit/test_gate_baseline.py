"""Baselines: read back as written; whatever is not whole, not ours, or of another device is refused, and told why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.cases import Case
from conformance.gate import run
from conformance.gate.baseline import BadBaseline, Baseline
from conformance.gate.numerics import CaseFigures
from conformance.gate.record import CellRecord, Record
from conformance.gate.result import Decisions, GateResult, Status
from conformance.gate.run import timed_cells
from conformance.gate.shown.history import dated
from conformance.gate.verdicts import CellVerdict, Mode, Outcome, Reason, RunVerdict
from conformance.plan import Subject, Target, plan
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.cli import app
from fp8moe.commands.gate import earlier
from fp8moe.platforms import PLATFORMS

RECORD = Record({"device": "one"}, {"X c": CellRecord("memory", 0.1, 0.001, 7, 16, 0)}, {"memory": 10.0}, 1e6)
BASELINE = Baseline(
    "2026-11-28T22:05:42+00:00",
    "cpu",
    "a processor",
    {"fp8moe": "0.1.0", "torch": "2.13.0"},
    0,
    "fp8moe gate --write FILE",
    "d",
    {"X block": {"v1:M=3": CaseFigures("0123", 1e-3, 0.5)}},
    [RECORD],
    [{"slower clocks": "none"}],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "baseline.json"
    made.write_text(BASELINE.to_json())
    return made


def test_it_reads_back(path: Path) -> None:
    assert Baseline.load(path) == BASELINE


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text(path.read_text()[:-20]), "no whole JSON .* it was cut short"),
        (lambda path: path.write_text("[]"), "no fp8moe gate baseline: `fp8moe gate --write FILE` makes one"),
        (lambda path: edited(path, lambda one: one.update(format=9)), "format 9, expected 2: write it anew"),
        (
            lambda path: edited(path, lambda one: one["numerics"]["X block"]["v1:M=3"].update(error=0.5)),
            "its digest is not that of its content: it was edited",
        ),
        (lambda path: edited(path, lambda one: one.pop("sha256")), "it was edited"),
    ],
)
def test_what_is_not_whole_is_refused(path: Path, spoil: Callable[[Path], None], why: str) -> None:
    spoil(path)
    with pytest.raises(BadBaseline, match=why):
        Baseline.load(path)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (replace(BASELINE, device="another"), "device: 'a processor' in the baseline, 'another' here"),
        (replace(BASELINE, target="cuda"), "target: 'cpu' in the baseline, 'cuda' here"),
        (replace(BASELINE, seed=1), "seed: 0 in the baseline, 1 here"),
        (
            replace(BASELINE, versions={"fp8moe": "0.1.0", "torch": "2.14.0"}),
            "versions.torch: '2.13.0' in the baseline, '2.14.0' here",
        ),
        (
            replace(BASELINE, numerics={"X block": {"v1:M=4": CaseFigures("", 0.0, 0.0)}}),
            "X block: 1 case not in the baseline, such as v1:M=4",
        ),
    ],
)
def test_another_kind_of_run_is_refused_with_what_differs(other: Baseline, why: str) -> None:
    BASELINE.check_comparable(BASELINE)
    with pytest.raises(BadBaseline) as caught:
        BASELINE.check_comparable(other)
    assert why in str(caught.value)
    assert "such runs are not compared" in str(caught.value)


def test_the_whole_is_as_bad_as_its_worst_part() -> None:
    result = GateResult("a with b", "a device", "2026-11-28", {})
    assert result.status is Status.NOT_RUN
    passed = replace(result, decisions=Decisions(Status.PASSED))
    assert passed.status is Status.PASSED

    def speed(outcome: Outcome, reason: Reason | None = None) -> RunVerdict:
        cell = CellVerdict("X c", outcome, 1.0, 0.99, 1.01, 0.01, 0.002, 16, 0, "screen", reason)
        return RunVerdict(Mode.STORED, (cell,), 1e6, 0.005)

    unsure = replace(passed, speed=speed(Outcome.INCONCLUSIVE, Reason.THROTTLED))
    assert unsure.status is Status.INCONCLUSIVE
    assert unsure.parts == {
        "decisions": Status.PASSED,
        "numerics": Status.NOT_RUN,
        "speed": Status.INCONCLUSIVE,
    }
    assert replace(passed, speed=speed(Outcome.SLOWER)).status is Status.FAILED
    assert replace(unsure, decisions=Decisions(Status.FAILED, ("x",))).status is Status.FAILED
    assert json.loads(unsure.to_json())["speed"]["cells"][0]["reason"] == "throttled"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of --write, --baseline, --against, --against-backend, not none"),
        (["--write", "x", "--baseline", "y"], "not --write and --baseline"),
        (["--baseline", "no/such/file"], "no/such/file: No such file or directory"),
        (["--write", "no/such/folder/file"], "--write no/such/folder/file: the folder does not exist"),
        (["--write", "x", "--part", "tempo"], "--part 'tempo' is not known; expected one of decisions"),
        (["--write", "x", "--part", "numerics", "--backend", "NOBODY"], "NOBODY"),
        (["--baseline", "x", "--html", "no/such/page"], "--html no/such/page: the folder does not exist"),
        (["--against", "no/such/checkout"], "torch"),
        (
            ["--baseline", "x", "--seed", "3"],
            "--seed has no meaning with --baseline: it goes with --write; leave it out",
        ),
        (["--write", "x", "--html", "y"], "--html has no meaning with --write"),
        (["--against", "x", "--part", "speed"], "--part has no meaning with --against: it goes with --write and"),
        (["--write", "."], "--write .: it is a folder; name a file"),
        (
            ["--write", "x", "--part", "speed", "--device", "cpu"],
            "nothing to write: of speed, speed is timed on a CUDA",
        ),
        (["--against-backend", "TRITON"], "compares one backend with TRITON: give --backend once"),
    ],
)
def test_bad_input_is_told(options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["gate", *options])
    assert result.exit_code == 64
    assert told in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


# -- what is timed --

_PLANNED = plan([Subject("TorchExperts", TorchExperts, "TorchExperts")], Target("cpu", PLATFORMS["cpu"], "cpu"))


class Limited(TorchExperts):
    contract = replace(TorchExperts.contract, max_top_k=1)


def test_what_a_backend_does_not_take_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("cpu", PLATFORMS["cpu"], "cpu")
    everything = timed_cells(["TorchExperts"], target)
    assert everything
    monkeypatch.setattr(run, "load_subject", lambda name: Subject(name, Limited, name))
    limited = [Case.parse(cell.case) for cell in timed_cells(["x:Limited"], target)]
    assert all(case.top_k == 1 for case in limited)
    assert len(limited) < len(everything)


def test_a_predicate_that_raises_keeps_a_run_from_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(cls: object, config: object, *given: object, **named: object) -> tuple[bool, None]:
        if getattr(config, "num_experts", 0) > 8:  # as the published layers have, and not the plan's own question
            raise RuntimeError("no such table")
        return True, None

    limited = type("Raises", (TorchExperts,), {"is_supported_config": staticmethod(raises)})
    monkeypatch.setattr(run, "load_subject", lambda name: Subject(name, limited, name))
    monkeypatch.setattr(run, "plan", lambda subjects, target: _PLANNED)
    with pytest.raises(run.GATE_ERRORS, match="its predicate raised RuntimeError: no such table"):
        timed_cells(["x:Raises"], Target("cpu", PLATFORMS["cpu"], "cpu"))


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_no_more_cells_than_asked_for(most: int) -> None:
    target = Target("cpu", PLATFORMS["cpu"], "cpu")
    everything = timed_cells(["TorchExperts"], target)
    assert 1 <= len(timed_cells(["TorchExperts"], target, most)) <= min(most, len(everything))


def test_a_backend_that_runs_nothing_here_has_no_cells() -> None:
    assert timed_cells(["MARLIN"], Target("cpu", PLATFORMS["cpu"], "cpu"), 3) == []


def test_a_setting_that_differs_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(BadBaseline, match="driver: '1' in the baseline, '2' here: such times are not compared"):
        run._check_setting({"driver": "1", "torch": "2"}, {"driver": "2", "torch": "2"}, Path("baseline.json"))


# -- the history of earlier runs --


def test_a_history_has_the_runs_of_the_same_device_the_oldest_first(tmp_path: Path) -> None:
    older = replace(BASELINE, date="2026-11-20T00:00:00+00:00")
    newer = replace(BASELINE, date="2026-11-30T00:00:00+00:00")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "newer.json").write_text(newer.to_json())
    stored = {"benchmarks": [{"extra_info": {Baseline.KEY: json.loads(older.to_json())}}]}
    (tmp_path / "0001_older.json").write_text(json.dumps(stored))
    (tmp_path / "elsewhere.json").write_text(replace(BASELINE, device="another").to_json())
    (tmp_path / "same.json").write_text(BASELINE.to_json())
    (tmp_path / "no_baseline.json").write_text("{}")
    assert earlier(tmp_path, BASELINE) == [older, BASELINE, newer]
    assert [run.date[:10] for run in dated(earlier(tmp_path, BASELINE))] == ["2026-11-20", "2026-11-28", "2026-11-30"]
    with pytest.raises(BadBaseline, match=r"--history .*: expected a folder of baselines"):
        earlier(tmp_path / "none", BASELINE)
