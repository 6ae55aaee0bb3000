"""`fp8moe measure` without a device: from times to a table that the measured policy reads, and to a summary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conformance.build import build
from conformance.cases import Case
from conformance.certificate.statement import EVIDENCE
from conformance.certificate.verifying import verify
from conformance.certificate.writing import write_certificate
from conformance.models import model_and_split
from conformance.performs import Floor, Work, work_of
from conformance.plan import Target
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.timing.cells import Layers
from conformance.timing.side_by_side import Contenders, Regret, SideBySide, Standing
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.cli import app
from fp8moe.commands import measure
from fp8moe.commands.measure import Measured, certificates_of, policy_lines, summary, table_of
from fp8moe.commands.question import BadInput
from fp8moe.measured import MeasuredTable
from fp8moe.measured.here import installed_versions
from fp8moe.platforms import PLATFORMS
from tests.unit.certificates import DEVICE, SMALL, VERSIONS, invented, surroundings

H100 = "NVIDIA H100 80GB HBM3"


def one(tokens: int, us: dict[str, float], model: str = "qwen3-30b-a3b:tp1") -> Measured:
    case = Case(model=model, tokens=tokens, law="router")
    times = SideBySide(
        {name: np.full(16, value) for name, value in us.items()}, {"MARLIN": "not installed"}, Work(0, 0), {}
    )
    best = min(us, key=us.__getitem__)
    return Measured(
        case,
        Contenders("TRITON", tuple(us), {}),
        times,
        Regret("TRITON", best, us["TRITON"] / us[best] - 1, 0, 1),
        None,
        Floor(1.0, "bytes"),
    )


@pytest.fixture(autouse=True)
def played_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: H100)
    monkeypatch.setattr(measure, "resolve_target", lambda name: Target("cuda", PLATFORMS["h100"], "cuda"))


def told(backend: str = "TRITON", status: Status = Status.PASSED) -> Report:
    checks = [
        CheckResult("selects", "a check", Status.PASSED, backend),
        CheckResult("computes", "another", status, backend),
    ]
    versions = installed_versions(*measure.VERSIONS)
    return Report(backend, backend, "certify", 0, "cuda", H100, versions, checks, date="2026-11-24T22:05:42+00:00")


def report(folder: Path, backend: str = "TRITON", status: Status = Status.PASSED) -> Path:
    path = folder / "report.json"
    path.write_text(told(backend, status).to_json())
    return path


def test_a_table_has_every_time_and_certificate(tmp_path: Path) -> None:
    found = [one(1, {"TRITON": 40.0, "DEEPGEMM": 30.0}), one(64, {"TRITON": 50.0, "x.y:Z": 1.0})]
    made = table_of(found, certificates_of([report(tmp_path)]))
    path = tmp_path / "times.json"
    made.save(path)
    read = MeasuredTable.load(path)
    assert [(row.tokens, row.backend, row.us) for row in read.rows] == [
        (1, "DEEPGEMM", 30.0),
        (1, "TRITON", 40.0),
        (64, "TRITON", 50.0),
    ]
    assert read.certified("TRITON")
    assert not read.certified("DEEPGEMM")
    assert read.device.name == H100


def test_tokens_of_a_rank_count_as_if_all_experts_were_there() -> None:
    (row,) = table_of([one(64, {"TRITON": 50.0}, "qwen3-30b-a3b:ep16")], {}).rows
    assert (row.tokens, row.shape.experts) == (4, 8)


def test_a_report_that_did_not_pass_gives_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--certificate .*report.verdict='failed': expected 'passed'"):
        certificates_of([report(tmp_path, status=Status.FAILED)])


def test_a_verdict_that_does_not_follow_from_its_checks_is_refused(tmp_path: Path) -> None:
    path = report(tmp_path, status=Status.FAILED)
    path.write_text(path.read_text().replace('"verdict": "failed"', '"verdict": "passed"', 1))
    with pytest.raises(BadInput, match=r"report.verdict='passed': its checks come to 'failed'; make the report again"):
        certificates_of([path])


def test_a_certificate_that_holds_gives_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "verify", partial(verify, editions=lambda name: SMALL))
    versions = VERSIONS | installed_versions(*measure.VERSIONS)
    made = replace(invented(), device=H100, versions=versions, backend="TRITON", origin="TRITON")
    made = replace(made, checks=[replace(check, backend="TRITON") for check in made.checks])
    folder = tmp_path / "certificate"
    around = surroundings() | {"device": DEVICE | {"name": H100}, "versions": made.versions}
    write_certificate(folder, made, SMALL.edition, around, None)
    assert certificates_of([folder])["TRITON"].level == SMALL.level
    (folder / EVIDENCE).write_bytes(b"")
    with pytest.raises(BadInput, match=r"--certificate .*certificate: it does not hold: .*; see fp8moe verify"):
        certificates_of([folder])


def test_the_summary_tells_the_regret_and_who_was_not_there() -> None:
    found = [one(n, {"TRITON": 100.0 + n, "DEEPGEMM": 100.0}) for n in (1, 10, 50)] + [one(2, {"TRITON": 1.0})]
    assert list(summary(found)) == [
        "regret of the seed's order over 3 cases: median 10.0%, p95 50.0%, worst 50.0%",
        "no regret in 1 case: one backend alone can run there",
        "absent: MARLIN, in 4 cases: not installed",
    ]


def test_the_policys_regret_stands_beside_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DEEPGEMM is slower for few tokens and faster for many; the seed's order takes it always."""
    found = [one(n, {"TRITON": 10.0 + n, "DEEPGEMM": 40.0 + n / 4}) for n in (1, 4, 16, 64, 256)]
    assert list(policy_lines(table_of(found, {}))) == []
    without = replace(PLATFORMS["h100"], libraries=frozenset({"deep_gemm"}))
    monkeypatch.setattr(measure, "resolve_target", lambda name: Target("cuda", without, "cuda"))
    certificates = certificates_of([report(tmp_path)])
    certificates |= certificates_of([report(tmp_path, backend="DEEPGEMM")])
    policy, seed = policy_lines(table_of(found, certificates))
    assert policy == (
        "measured policy, each point left out of the table: median 0.0%, p95 265.9%, max 265.9% over 5 points; "
        "by measurement alone: median 0.0%, p95 0.0%, max 0.0% over 3"
    )
    assert seed == (
        "the seed's order at the same points: median 69.2%, p95 265.9%, max 265.9% over 5; "
        "where measurement decides: median 69.2%, p95 192.9%, max 192.9% over 3"
    )


def test_the_numbers_of_tokens_are_those_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer after the other, each built once, for its most tokens; no layer has more than `LARGEST_TOKENS`."""
    timed: list[Case] = []
    built: list[Case] = []
    monkeypatch.setattr(Standing, "of", lambda largest: built.append(largest) or "standing")
    monkeypatch.setattr(measure, "_one", lambda case, target, also, standing: timed.append(case))
    measure.measured((), None, (3, 5, 1000))
    layers = list(dict.fromkeys(replace(case, tokens=1) for case in timed))
    assert [replace(case, tokens=1) for case in built] == layers
    of_rank: dict[str, list[int]] = {}
    for case in timed:
        ranks = model_and_split(str(case.model))[1].ep_size
        of_rank.setdefault(str(replace(case, tokens=1)), []).append(case.tokens // ranks)
        assert case.tokens % ranks == 0
        assert case.tokens <= measure.LARGEST_TOKENS
    assert {tuple(tokens) for tokens in of_rank.values()} == {(3, 5), (3, 5, 1000)}
    assert [case.tokens for case in built] == [
        max(case.tokens for case in timed if replace(case, tokens=1) == layer) for layer in layers
    ]


def test_a_standing_layer_is_called_with_the_first_tokens() -> None:
    """The same weights; the tokens, and the work, are those of the smaller case."""
    largest = Case(tokens=5, experts=4, top_k=2)
    tensors = build(largest)
    layers = Layers([tensors, tensors], work_of(tensors), Floor(1.0, "bytes"))
    part = layers.first(replace(largest, tokens=2))
    for one in part.calls:
        assert one.weights is tensors.weights
        assert torch.equal(one.hidden_states, tensors.hidden_states[:2])
        assert torch.equal(one.topk_ids, tensors.topk_ids[:2])
        assert torch.equal(one.topk_weights, tensors.topk_weights[:2])
    assert part.work == work_of(part.calls[0]) != layers.work
    assert torch.equal(
        part.calls[0].call(TorchExperts(tensors.config, tensors.quant, tensors.weights)),
        tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))[:2],
    )


def test_without_a_device_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["measure"])
    assert result.exit_code == 64
    assert "needs a CUDA device" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--certificate", "x"], "--certificate goes into the table of --out: give that too"),
        (["--tokens", "1,x"], "--tokens 1,x: expected positive integers with commas between them, such as 1,16,256"),
        (["--tokens", "0"], "--tokens 0: expected positive integers"),
        (["--out", "no/such/folder/file"], "--out no/such/folder/file: expected a file in a folder that exists"),
    ],
)
def test_bad_options_are_told_before_anything_is_timed(options: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["measure", *options])
    assert result.exit_code == 64
    assert told in " ".join(result.stderr.split())
