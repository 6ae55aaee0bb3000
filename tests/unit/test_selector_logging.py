"""What the selector logs (specification section 1.2): one INFO a choice, one DEBUG a refusal, each text once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from conformance.selection.ask import (
    AITER_MOE,
    CPU,
    DEEP_GEMM,
    ELEVEN,
    FLASHINFER,
    FLASHINFER_BACKEND,
    GFX942,
    MARLIN,
    SM89,
    SM90,
    SM100,
    explain,
    select,
)
from fp8moe.log_once import reset_log_deduplication

LOGGER = "fp8moe.selector"
NAMES = [spec.name for spec in ELEVEN]
Caplog = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def _fresh(caplog: Caplog) -> None:
    reset_log_deduplication()
    caplog.set_level(logging.DEBUG, LOGGER)


def texts(caplog: Caplog, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno == level]


def named(text: str) -> list[str]:
    """The backends that a text names, in order; a name inside another does not count."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return [word for word in words if word in NAMES]


def test_a_scan_logs_one_choice_and_each_refusal_before_it(caplog: Caplog) -> None:
    assert select(SM90) == "FLASHINFER_CUTLASS"
    (info,) = texts(caplog, logging.INFO)
    left = [name for name in NAMES if "VLLM_CUTLASS" not in name]
    assert sorted(named(info)) == sorted(["FLASHINFER_CUTLASS", *left])
    refused = texts(caplog, logging.DEBUG)
    assert [named(text)[0] for text in refused] == ["AITER", "FLASHINFER_TRTLLM"]
    assert all("DEVICE" in text for text in refused)


def test_the_list_holds_what_was_not_yet_removed_q23(caplog: Caplog) -> None:
    select(SM90, {FLASHINFER: "0", DEEP_GEMM: "1", AITER_MOE: "0"})
    (info,) = texts(caplog, logging.INFO)
    left = [name for name in NAMES if not name.startswith("FLASHINFER")]
    assert sorted(named(info)) == sorted(["DEEPGEMM", *left])
    assert texts(caplog, logging.DEBUG) == []


@pytest.mark.parametrize(
    ("on", "env", "chosen"),
    [
        (SM100, {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"}, "FLASHINFER_TRTLLM"),
        (SM90, {FLASHINFER: "1"}, "FLASHINFER_CUTLASS"),
        (SM89, {MARLIN: "1"}, "MARLIN"),
        (GFX942, {"VLLM_ROCM_USE_AITER": "1"}, "AITER"),
    ],
    ids=["R3b", "R3c", "R5", "R6b"],
)
def test_an_honoured_must_use_logs_its_choice_and_the_whole_list(
    on: object, env: dict[str, str], chosen: str, caplog: Caplog
) -> None:
    assert select(on, env) == chosen  # type: ignore[arg-type]
    choices = [text for text in texts(caplog, logging.INFO) if len(named(text)) > 1]
    assert [sorted(named(text)) for text in choices] == [sorted([chosen, *NAMES])]


def test_r3c_logs_both_refusals(caplog: Caplog) -> None:
    with pytest.raises(NotImplementedError):
        select(SM89, {FLASHINFER: "1"})
    assert [named(text)[0] for text in texts(caplog, logging.DEBUG)] == ["FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS"]
    assert texts(caplog, logging.INFO) == []


def test_lora_and_none_log_no_choice(caplog: Caplog) -> None:
    assert select(SM90, {DEEP_GEMM: "1"}, lora=True) == "TRITON"
    assert texts(caplog, logging.DEBUG) + texts(caplog, logging.INFO) == []
    assert select(CPU) == "NONE"
    assert texts(caplog, logging.INFO) == []
    assert [named(text)[0] for text in texts(caplog, logging.DEBUG)] == [n for n in NAMES if "VLLM_CUTLASS" not in n]


def test_each_text_is_logged_once(caplog: Caplog) -> None:
    for _ in range(3):
        select(SM90)
    once = texts(caplog, logging.DEBUG) + texts(caplog, logging.INFO)
    assert len(once) == len(set(once)) == 3
    select(SM90, {FLASHINFER: "0"})
    assert len(texts(caplog, logging.INFO)) == 2
    reset_log_deduplication()
    select(SM90)
    assert len(texts(caplog, logging.INFO)) == 3


def test_a_text_that_nobody_heard_is_not_used_up(caplog: Caplog) -> None:
    logging.getLogger(LOGGER).setLevel(logging.ERROR)
    select(SM90)
    logging.getLogger(LOGGER).setLevel(logging.DEBUG)
    select(SM90)
    assert len(texts(caplog, logging.INFO)) == 1


def test_explain_logs_nothing(caplog: Caplog) -> None:
    explain(SM90)
    explain(SM89, {FLASHINFER: "1"})
    assert [r for r in caplog.records if r.name == LOGGER] == []


def test_a_new_process_logs_again() -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s|%(levelname)s|%(message)s')\n"
        "from conformance.selection.ask import SM90, select\n"
        "select(SM90); select(SM90)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{LOGGER}|INFO|")]
    assert len(lines) == 1
    assert "FLASHINFER_CUTLASS" in lines[0]
