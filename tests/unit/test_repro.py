"""`fp8moe repro`: a case, and failures of reports and certificates, run again; where it shows, and what is written."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.bits import digest
from conformance.cases import Case
from conformance.checks import EQUIVALENCE, check_case
from conformance.matrix import BY_BITS
from conformance.mismatches import exactly
from conformance.oracles import tensors_of
from conformance.plan import Subject, resolve_target
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.recorded import recorded
from conformance.report import Report
from conformance.repro import run_again, told_mismatch
from conformance.results import CheckResult, Evidence, Status
from conformance.untrusted import Malformed
from conformance.vocabulary import SCHEME_NAMES
from conformance.zoo import TORCH
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.commands import repro
from fp8moe.commands.question import BadInput
from tests.unit.certificates import invented, written
from tests.unit.command_line import no_variables, python, run  # noqa: F401 (a fixture)

safetensors = pytest.importorskip("safetensors", reason="the tensors of a case are written by safetensors")
MUTANT = "conformance.zoo:TORCH.expert0_scale"
SUBJECT = Subject("expert0_scale", TORCH.expert0_scale, MUTANT)
SMALL = Case(experts=4, hidden=144, inter=128, tokens=17, values="block_scales", seed=1)
HERE = resolve_target("cpu")


def failed(case: Case = SMALL, **others: str) -> CheckResult:
    given = {"scheme": case.scheme, "case": str(case), "reason": "E1 = 3 > 1", **others}
    return CheckResult("computes", EQUIVALENCE, Status.FAILED, "MUTANT", evidence=Evidence.HARDWARE, **given)


def report(*checks: CheckResult, target: str = "cpu") -> Report:
    return Report("MUTANT", MUTANT, "smoke", 3, target, "a device", {"torch": "2"}, checks)


def kept(folder: Path, *checks: CheckResult, name: str = "report.json", target: str = "cpu") -> Path:
    path, text = folder / name, report(*checks, target=target).to_json().encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


# -- where it shows --


def test_the_element_where_it_fails_most_is_told_in_full() -> None:
    again = run_again(SMALL, SUBJECT, HERE, EQUIVALENCE)
    found = again.mismatch
    assert found is not None
    told = dict(told_mismatch(again))
    tensors = tensors_of(SMALL, "cpu")
    ids = tensors.topk_ids[found.token].tolist()
    assert told["token"] == f"{found.token} of 17"
    assert all(f"{expert} (weight " in told["experts of the token"] for expert in ids)
    assert found.expert in (None, *ids)
    assert told["column"] == f"{found.column} of 144"
    assert told["block of columns"].startswith(f"{found.column // 128}: columns {found.column // 128 * 128} to ")
    assert f", {found.column // 128}]" in told["scale of w2 there"]
    assert (told["expected"], told["got"]) == (f"{found.expected:.9g}", f"{found.got:.9g}")
    assert found.error_over_bound > 1
    assert found.error / found.bound == found.error_over_bound
    assert f"{found}" in again.result.reason


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_scale_there_is_that_of_the_scheme(scheme: str) -> None:
    """With one expert for all tokens it is the one to blame, and the scale is told."""
    case = replace(SMALL, scheme=scheme, experts=2, top_k=1, ep="2:1", law="all_to_one", values="iid")
    again = run_again(case, Subject("loud", Loud, "tests.unit.test_repro:Loud"), HERE, EQUIVALENCE)
    told = dict(told_mismatch(again))
    assert (told["expert to blame"], told["column"]) == ("1", "130 of 144")
    weights = tensors_of(case, "cpu").weights
    if weights.w2_scale is None:
        assert told["scale of w2 there"] == f"none, scheme {scheme}"
        return
    where, _, value = told["scale of w2 there"].partition(" = ")
    expected = {1: "w2_scale[0]", 3: f"w2_scale[0, {1 if 'block' in scheme else 130}]"}
    assert where == expected[weights.w2_scale.dim()]
    assert float(value.partition(",")[0]) > 0


def test_of_bits_that_must_be_equal_the_bound_is_nothing() -> None:
    found = exactly(3, 130, 1.0, 1.5, hidden=144)
    assert (found.columns, found.error, found.bound) == ((128, 143), 0.5, 0.0)


def test_a_failed_relation_says_where() -> None:
    check = "relation.expert_relabelling"
    done = run("repro", str(SMALL), "--backend", MUTANT, "--device", "cpu", "--check", check, status=1)
    for name in ("token", "experts of the token", "block of columns", "expected", "got", "error", "bound"):
        assert name in done.stdout, done.stdout
    assert f", {check}" in done.stdout


# -- from a report or a certificate --


@pytest.mark.parametrize("name", ["report.json", "report.json.gz"])
def test_a_reports_failure_runs_again_with_all_that_it_names(name: str, tmp_path: Path) -> None:
    path = kept(tmp_path, failed(), name=name)
    done = run("repro", str(path), status=1)
    assert f"expert0_scale on cpu: {SMALL}" in done.stdout
    assert "failures, found on" not in done.stdout  # it is the only one
    here = check_case(SMALL, SUBJECT, HERE)
    assert f"status: failed: {here.reason}" in done.stdout


def test_of_several_they_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    second = replace(SMALL, tokens=3)
    path = kept(tmp_path, failed(), failed(second), replace(failed(), status=Status.WAIVED, reason="waived: known"))
    first = run("repro", str(path), status=1).stdout
    assert "3 failures, found on a device" in first
    assert first.count("E1 = 3 > 1") == 2
    assert "waived: known" in first
    assert f"on cpu: {SMALL}" in first
    assert f"on cpu: {second}" in run("repro", str(path), "--number", "2", status=1).stdout
    with pytest.raises(BadInput, match="--number 4: it has 3 failures"):
        repro.reproduced(str(path), repro.Given(number=4))


def test_an_option_overrides_what_the_file_says(tmp_path: Path) -> None:
    path = kept(tmp_path, failed(), target="cuda")
    options = ("--backend", "TorchExperts", "--device", "cpu", "--seed", "5", "--check", "relation.chunks")
    done = run("repro", str(path), *options)
    assert f"TorchExperts on cpu: {replace(SMALL, seed=5)}, relation.chunks" in done.stdout
    assert "status: passed" in done.stdout
    with pytest.raises(BadInput, match=r"^--check=relation\.nothing: expected one of equivalence"):
        repro.reproduced(str(path), repro.Given(check="relation.nothing"))


def test_where_there_is_no_such_device_it_says_what_runs_it(tmp_path: Path) -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("needs a machine without a GPU: this one may have the device")
    done = run("repro", str(kept(tmp_path, failed(), target="cuda")), status=2)
    assert "it failed on cuda (a device), and no such device is here; --device cpu runs it" in done.stderr
    ours = replace(report(failed(), target="rocm"), origin="TRITON")
    (tmp_path / "triton.json").write_text(ours.to_json())
    done = run("repro", str(tmp_path / "triton.json"), status=2)
    assert "--device interpreter runs it" in done.stderr


def test_what_failed_in_the_interpreter_runs_there_again(tmp_path: Path) -> None:
    case = replace(SMALL, experts=2, hidden=128, tokens=3)
    told = replace(report(failed(case), target="interpreter"), origin="TRITON")
    (tmp_path / "report.json").write_text(told.to_json())
    done = python("from fp8moe.cli import main; main()", "repro", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"TRITON on interpreter: {case}" in done.stdout
    assert "evidence: simulated" in done.stdout


def test_a_certificates_failure(tmp_path: Path) -> None:
    folder = written(tmp_path / "certificate", replace(invented(failing=2), origin=MUTANT))
    first = invented(failing=2).failures[0]
    done = run("repro", str(folder), "--device", "cpu", status=1)
    assert "2 failures, found on a GPU" in done.stdout
    assert f"expert0_scale on cpu: {first.case}" in done.stdout


@pytest.mark.parametrize(
    ("check", "command"),
    [
        (FINGERPRINT, f"fp8moe probe {MUTANT} --device cpu"),
        ("selects.predicate", f"fp8moe check {MUTANT} --level smoke --seed 3 --device cpu"),
    ],
)
def test_what_failed_on_no_case_names_the_command(check: str, command: str, tmp_path: Path) -> None:
    done = run("repro", str(kept(tmp_path, replace(failed(), check=check, case=""))), status=2)
    assert f"{check} failed on no single case; it is run again: {command}" in done.stderr


def test_a_suites_report_names_each_backend(tmp_path: Path) -> None:
    result = json.loads(failed(reproduce=f"python -m fp8moe repro x --backend {MUTANT}").to_json())
    content = {"format": 1, "target": "cpu", "device": {"name": "a CPU"}, "cells": [], "results": [result]}
    (tmp_path / "suite.json").write_text(json.dumps(content))
    assert f"expert0_scale on cpu: {SMALL}" in run("repro", str(tmp_path / "suite.json"), status=1).stdout


def test_a_report_without_a_failure(tmp_path: Path) -> None:
    done = run("repro", str(kept(tmp_path, replace(failed(), status=Status.PASSED, reason=""))), status=2)
    assert "no failure is in it" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nothing.json", None, "no such file or folder, and no case's id"),
        ("empty.json", b"", "no JSON"),
        ("list.json", b"[]", "expected an object"),
        ("other.json", b'{"format": 1}', "no report of check_backend"),
        ("bytes.json", b"\xff", "no text in UTF-8"),
        ("bytes.json.gz", b"\xff", "no whole gzip file"),
        ("suite.json", b'{"cells": [], "results": 3, "target": "cpu"}', "results: expected a list"),
    ],
)
def test_what_is_no_report(name: str, content: bytes | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("repro", str(tmp_path / name), status=64)
    (line,) = done.stderr.splitlines()
    assert told in line


def test_nothing_of_a_file_becomes_a_command_or_escapes_its_line(tmp_path: Path) -> None:
    hostile = replace(report(replace(failed(), case="")), origin="a;reboot", device="a\x1b[2Jdevice")
    (tmp_path / "hostile.json").write_text(hostile.to_json())
    found = recorded(tmp_path / "hostile.json")
    assert (found.failures[0].origin, found.failures[0].otherwise) == ("", "")
    two = replace(hostile, checks=(replace(failed(), reason="a\x1b[2Jb"), failed()))
    (tmp_path / "hostile.json").write_text(two.to_json())
    done = run("repro", str(tmp_path / "hostile.json"), status=2)
    assert "give --backend" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"origin": "NO_SUCH_BACKEND"}, "its backend is not here"),
        ({"target": "quantum"}, "no such device is here"),
    ],
)
def test_what_is_not_here(change: dict[str, str], told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(replace(report(failed()), **change).to_json())  # type: ignore[arg-type]
    assert told in run("repro", str(tmp_path / "report.json"), status=2).stderr


@pytest.mark.parametrize("case", ["v1:M=9999999999999", "v1:E=9999999999999,M=1", "v1:H=9999999999,M=1"])
def test_a_case_without_end_is_not_begun(case: str, tmp_path: Path) -> None:
    done = run("repro", str(kept(tmp_path, failed(Case.parse(case)))), status=2)
    assert "is larger than 32 GiB" in done.stderr


def test_what_a_newer_version_wrote_is_told_as_such(tmp_path: Path) -> None:
    done = run("repro", str(kept(tmp_path, replace(failed(), check="computes.relation.tomorrow"))), status=64)
    assert "written by a newer version of fp8moe? upgrade it" in done.stderr
    path = kept(tmp_path, failed())
    path.write_text(path.read_text().replace('"seed"', '"tomorrow": 1,\n "seed"'))
    with pytest.raises(Malformed, match="'tomorrow': no field of it; written by a newer version"):
        recorded(path)


# -- what is written --


def test_the_tensors_can_be_read_and_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    run("repro", str(SMALL), "--backend", MUTANT, "--device", "cpu", "--dump", str(path), status=1)
    tensors, told = loaded(path)
    for name, tensor in tensors_of(SMALL, "cpu").named().items():
        assert tensors[name].dtype == tensor.dtype, name
        assert digest(tensors[name]) == digest(tensor), name
    here = check_case(SMALL, SUBJECT, HERE)
    assert (told["case"], told["origin"], told["status"]) == (str(SMALL), MUTANT, "failed")
    assert (told["check"], told["reason"], told["digest"]) == (EQUIVALENCE, here.reason, here.digest)
    assert set(json.loads(told["versions"])) == {"fp8moe", "python", "torch", "triton"}
    assert digest(tensors["got"]) == here.digest
    where = json.loads(told["mismatch"])
    row = tensors["tokens"].tolist().index(where["token"])
    column = where["column"]
    assert float(tensors["got"][where["token"], column]) == where["got"]
    assert float(tensors["bound"][row, column]) == where["bound"]
    assert abs(float(tensors["got"][where["token"], column] - tensors["expected"][row, column])) == where["error"]
    assert list(tmp_path.iterdir()) == [path]


def test_other_layouts_and_fnuz_weights_can_be_written_too(tmp_path: Path) -> None:
    case = Case(
        experts=4, hidden=128, inter=128, tokens=3, scheme="tensor_static", fnuz=True, layout="strided", ep="2:1"
    )
    path = tmp_path / "case.safetensors"
    run("repro", str(case), "--backend", "TorchExperts", "--device", "cpu", "--dump", str(path))
    tensors, _ = loaded(path)
    assert tensors["w13"].dtype == torch.float8_e4m3fnuz
    assert torch.equal(tensors["hidden_states"], tensors_of(case, "cpu").hidden_states)
    assert {"a13_scale", "a2_scale", "expert_map", "got", "expected", "bound"} <= set(tensors)


def test_where_bits_are_declared_they_are_written(tmp_path: Path) -> None:
    path, code = tmp_path / "case.safetensors", "from fp8moe.cli import main; main()"
    case = "v1:E=2,k=1,H=128,I=128,M=3,values=exact_sums"
    done = python(code, "repro", case, "--device", "interpreter", "--dump", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages, in order, beside the replay" in done.stdout
    tensors, told = loaded(path)
    assert told["judged_by"] == BY_BITS
    assert torch.equal(tensors["got"][tensors["tokens"]], tensors["replay"])


def test_of_a_backend_that_cannot_be_made_the_case_is_written(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    case = replace(SMALL, hidden=128)
    run(
        "repro",
        str(case),
        "--backend",
        "tests.unit.test_repro:Raises",
        "--device",
        "cpu",
        "--dump",
        str(path),
        status=1,
    )
    tensors, told = loaded(path)
    assert "w13" in tensors
    assert not {"got", "expected"} & set(tensors)
    assert "its constructor raised RuntimeError" in told["reason"]


class Loud(TorchExperts):
    """One column is too large."""

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = super().apply(*args, **kwargs)
        result[:, 130] *= 2
        return result


class Raises(TORCH.expert0_scale):  # type: ignore[misc]
    def __init__(self, *_: object) -> None:
        raise RuntimeError("no kernels")


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    path.write_text("mine")
    given = repro.Given("TorchExperts", "cpu", dump=path)
    with pytest.raises(BadInput, match=r"is there already; name another, or give --overwrite"):
        repro.reproduced(str(SMALL), given)
    assert path.read_text() == "mine"
    assert repro.reproduced(str(SMALL), replace(given, overwrite=True)) == 0
    assert loaded(path)[1]["status"] == "passed"
    for name, told in (("case.bin", "ends in .safetensors"), ("no/case.safetensors", "the folder does not exist")):
        with pytest.raises(BadInput, match=told):
            repro.reproduced(str(SMALL), replace(given, dump=tmp_path / name))


def test_half_a_file_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def half(_tensors: object, path: Path, _told: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    path = tmp_path / "case.safetensors"
    with pytest.raises(BadInput, match="no space left; nothing is written"):
        repro.reproduced(str(SMALL), repro.Given("TorchExperts", "cpu", dump=path))
    assert list(tmp_path.iterdir()) == []


def loaded(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
