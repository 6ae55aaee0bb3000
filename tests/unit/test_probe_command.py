"""`fp8moe probe`: on a backend, on a class, on the emulated units, on nothing; exit statuses; bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conformance.plan import Target
from conformance.probe.backend import TOKENS
from conformance.probe.known import emulated_dot
from conformance.results import Status
from fp8moe import cli
from fp8moe.commands import probe
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.reference.units import UNITS

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["probe", *arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def test_command_on_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run("TorchExperts", "--device", "cpu")
    for expected in ("TorchExperts on cpu: passed", "channel_tok", "block", "as declared", "evidence: hardware"):
        assert expected in text
    told = json.loads(run("TorchExperts", "--device", "cpu", "--json"))
    assert (told["status"], told["evidence"], told["device"]) == ("passed", "hardware", "cpu")
    assert [(row["scheme"], row["tokens"]) for row in told["readings"]] == [
        (scheme, tokens) for scheme in ("channel_tok", "block") for tokens in TOKENS
    ]
    assert {row["verdict"] for row in told["readings"]} == {"as declared"}
    assert Arithmetic(**told["readings"][0]["looks_like"][0]["arithmetic"]) == FP32


LIAR = """
from dataclasses import replace
import torch
from fp8moe import Arithmetic
from fp8moe.backends.torch_experts import TorchExperts

class Liar(TorchExperts):
    def second_gemm(self, intermediate, index):
        total = torch.zeros(len(intermediate), self.weights.w2.shape[1])
        weight = self.weight("w2", index)
        for k in range(0, weight.shape[1], 32):
            total = (total + intermediate[:, k : k + 32] @ weight[:, k : k + 32].t()).bfloat16().float()
        return total

class Modest(TorchExperts):
    contract = replace(TorchExperts.contract, arithmetic=Arithmetic.on("hopper.wgmma"))
"""


def test_command_on_a_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "probed_backends.py").write_text(LIAR)
    monkeypatch.syspath_prepend(tmp_path)
    text = run("probed_backends:Liar", "--device", "cpu", status=1)
    assert "worse than declared: declared fp32" in text
    assert "8 bits carried" in text
    text = run("probed_backends:Modest", "--device", "cpu")
    assert "better than declared: declared hopper.wgmma" in text


def test_command_on_the_units() -> None:
    told = json.loads(run("--units", "--json"))
    assert {row["arithmetic"]["unit"] for row in told["units"]} == set(UNITS)
    assert all(row["right"] for row in told["units"])
    assert told["evidence"] == "simulated"


def test_command_says_what_cannot_be_probed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.commands.probe.detected_platform", lambda: PLATFORMS["cpu"])
    text = run(status=2)
    assert "torch._scaled_mm on cpu: not_run" in text
    assert "TRITON on cpu: not_run" in text
    assert {row["status"] for row in json.loads(run("--json", status=2))} == {"not_run"}


def test_a_units_row_that_is_misread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row, looks_like=()) if row.given.unit == "ada.mma" else row for row in probe.units()[:20]]
    monkeypatch.setattr(probe, "units", lambda: rows)
    monkeypatch.setenv("COLUMNS", "220")
    assert run("--units", status=1).count("NO: looks like nothing known") == 3


def test_the_devices_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not here: torch's function emulated, and our kernels missing."""

    def scaled_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, use_fast_accum: bool, **_scales: Tensor) -> Tensor:
        every = None if use_fast_accum else 128
        return emulated_dot(Arithmetic.on("hopper.wgmma", promote_every=every))(a, b.T).to(out_dtype)

    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(probe, "detected_platform", lambda: PLATFORMS["h100"])
    monkeypatch.setattr(probe, "resolve_target", lambda name: Target(name, PLATFORMS["h100"], "cpu"))
    found = probe.probe_here(None)
    assert [one.status for one in found] == [Status.PASSED, Status.PASSED, Status.NOT_RUN]
    assert [one.readings[0].seen.promote_every for one in found[:2]] == [128, "never"]
    assert probe.exit_status(found) == 0
    text = run()
    assert "torch._scaled_mm, fast accumulation off on cuda: passed" in text
    assert "declare Arithmetic.on('hopper.wgmma', promote_every=128)" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["NOBODY", "--device", "cpu"], "NOBODY: no backend has this name"),
        (["TorchExperts", "--device", "abacus"], "expected one of"),
        (["--device", "cpu"], "name a backend"),
        (["TorchExperts", "--units"], "neither a backend nor a device"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], expected: str) -> None:
    text = run(*arguments, status=cli.EXIT_BAD_INPUT)
    assert expected in text
    assert text.startswith("fp8moe: ")
    assert text.count("\n") == 1
