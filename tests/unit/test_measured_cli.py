"""`fp8moe explain --measured FILE --tokens N`: the choice, the times, the reasons, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8moe import cli
from fp8moe.measured import installed_versions
from fp8moe.measured.here import device_name_here
from fp8moe.measured.rows import MeasuredDevice
from fp8moe.measured.table import MeasuredTable
from fp8moe.platforms import detected_platform
from tests.unit.command_line import explain, no_variables, run  # noqa: F401 (a fixture)
from tests.unit.measured_tables import carried_over

ON = ("--platform", "h100", "--libraries", "deep_gemm,vllm", "--model", "deepseek-v3:tp8")


@pytest.fixture
def times(tmp_path: Path) -> str:
    path = tmp_path / "times.json"
    carried_over("h100").save(path)
    return str(path)


def test_the_choice_and_the_times(times: str) -> None:
    arguments = (*ON, "--measured", times, "--tokens", "128")
    answer = explain(*arguments)
    assert (answer["backend"], answer["rule"]) == ("MARLIN", "measured")
    told = answer["measured"]
    assert (told["tokens"], told["fallback"], told["seed"]) == (128, None, "DEEPGEMM")
    assert told["device"] == {"name": "H100 80GB HBM3", "kind": "cuda", "architecture": "sm90"}
    by_name = {row["backend"]: row for row in told["times"]}
    assert set(by_name["MARLIN"]) == {"backend", "us", "accepted", "certified", "rows", "detail"}
    assert by_name["MARLIN"]["rows"] == [64, 256]
    assert by_name["MARLIN"]["us"] < by_name["TRITON"]["us"] < by_name["DEEPGEMM"]["us"]
    text = run("explain", *arguments).stdout
    for words in (
        "times of H100 80GB HBM3 (cuda sm90) at 128 tokens",
        "on the line from 64 (435 us) to 256 (556 us) tokens",
        "measured: MARLIN is the fastest at 128 tokens",
        "choice: MARLIN, by rule measured",
    ):
        assert words in text


def test_the_seeds_order_where_nothing_was_measured(times: str) -> None:
    arguments = (*ON, "--measured", times, "--tokens", "99999")
    answer = explain(*arguments)
    assert (answer["backend"], answer["rule"], answer["measured"]["fallback"]) == ("DEEPGEMM", "R8", "TOKENS")
    assert "not measured (TOKENS): a call of 99,999 tokens is outside" in run("explain", *arguments).stdout
    forced = explain(*ON, "--measured", times, "--tokens", "1", "--env", "VLLM_USE_DEEP_GEMM=1")
    assert (forced["backend"], forced["rule"], forced["measured"]["fallback"]) == ("DEEPGEMM", "R4b", "RULE")
    lora = explain(*ON, "--measured", times, "--tokens", "1", "--lora")
    assert (lora["backend"], lora["rule"], lora["measured"]["times"]) == ("TRITON", "R1", [])
    failed = explain(*ON, "--measured", times, "--tokens", "1", "--env", "VLLM_ROCM_USE_AITER=1", status=2)
    assert (failed["error"]["type"], failed["measured"]["fallback"]) == ("BackendNotSupported", "RULE")
    elsewhere = explain("--platform", "mi300x", "--measured", times, "--tokens", "1")
    assert elsewhere["measured"]["fallback"] == "DEVICE"


def test_without_a_table_nothing_is_added() -> None:
    assert "measured" not in explain(*ON)


def test_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch, times: str) -> None:
    from tests.unit.measured_tables import WITHOUT_FLASHINFER

    for module in ("fp8moe.commands.question", "fp8moe.measured.explanation"):
        monkeypatch.setattr(f"{module}.detected_platform", lambda: WITHOUT_FLASHINFER)
    for module in ("fp8moe.commands.explain", "fp8moe.measured.table"):
        monkeypatch.setattr(f"{module}.device_name_here", lambda: "H200")
    model = ("--model", "deepseek-v3:tp8", "--measured", times, "--tokens", "128")
    assert explain(*model)["measured"]["why"].startswith("this is H200, the table is of H100 80GB HBM3")
    for module in ("fp8moe.commands.explain", "fp8moe.measured.table"):
        monkeypatch.setattr(f"{module}.device_name_here", lambda: "H100 80GB HBM3")
    monkeypatch.setattr("fp8moe.measured.table.installed_versions", lambda *_: {"fp8moe": "0.0.1"})
    assert explain(*model)["measured"]["fallback"] == "VERSIONS"
    assert explain(*model, "--libraries", "vllm")["backend"] == "MARLIN"  # what if: the versions do not count


def test_this_machine_as_it_is(tmp_path: Path) -> None:
    platform = detected_platform()
    device = MeasuredDevice(device_name_here().strip(), platform.kind, platform.architecture)
    path = tmp_path / "here.json"
    MeasuredTable(device, installed_versions("fp8moe", "torch")).save(path)
    answer = json.loads(run("explain", "--json", "--lora", "--measured", str(path), "--tokens", "1").stdout)
    assert answer["measured"]["fallback"] == "RULE"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "16"], "--tokens goes with --measured FILE; add it"),
        (["--measured", "TIMES"], "--measured goes with --tokens N; add it"),
        (["--measured", "TIMES", "--tokens", "16", "--all-platforms"], "leave --all-platforms out"),
        (["--measured", "nowhere.json", "--tokens", "16"], "nowhere.json cannot be read: No such file"),
        (["--measured", "EDITED", "--tokens", "16"], "the file was edited or cut"),
    ],
)
def test_bad_input(times: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    edited = tmp_path / "edited.json"
    edited.write_text(Path(times).read_text().replace("474", "47"))
    given = {"TIMES": times, "EDITED": str(edited)}
    result = run("explain", *(given.get(word, word) for word in arguments), status=cli.EXIT_BAD_INPUT)
    (line,) = result.stderr.splitlines()
    assert line.startswith("fp8moe: ")
    assert words in line
    assert result.stdout == ""
