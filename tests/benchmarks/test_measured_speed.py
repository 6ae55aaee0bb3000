"""How long a selection by measurement takes, the table in memory: warm frozen inputs, over many numbers of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fp8moe.measured import MeasuredTable, select_measured
from fp8moe.measured.regret import layer_of
from fp8moe.registry import default_backends
from fp8moe.schemes import SCHEMES
from tests.unit.measured_tables import WITHOUT_FLASHINFER, carried_over

pytest.importorskip("pytest_benchmark")

ROUNDS = 20
TARGET_US = 20.0
"""Of one selection."""
STRICT = bool(os.environ.get("FP8MOE_BENCH_STRICT"))
"""As in test_selection_speed.py: without it the figure is printed and nothing is asserted."""
TOKENS = (1, 2, 3, 16, 40, 100, 256, 300, 1000, 4096, 5000, 16384, 20000)
"""Measured, between, and beyond."""


def measure(benchmark: Any, capsys: pytest.CaptureFixture[str], run: Callable[[], None], calls: int) -> None:
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled:
        return
    us = benchmark.stats.stats.median / calls * 1e6
    benchmark.extra_info["us_per_selection"] = round(us, 2)
    with capsys.disabled():
        print(f"\n{benchmark.name}: {us:.2f} us a selection (target {TARGET_US:g})")
    if STRICT:
        assert us <= TARGET_US


def questions(table: MeasuredTable) -> list[tuple[Any, ...]]:
    shapes = sorted({row.shape for row in table.rows})
    return [(layer_of(shape), *SCHEMES[shape.scheme]) for shape in shapes]


def test_warm_frozen_inputs(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table, backends, env = carried_over("h100"), tuple(default_backends()), dict[str, str]()
    calls = [(*question, tokens) for question in questions(table) for tokens in TOKENS] * 20

    def run() -> None:
        for config, weight_key, activation_key, tokens in calls:
            select_measured(
                config,
                weight_key,
                activation_key,
                tokens=tokens,
                table=table,
                allow_vllm_cutlass=True,
                platform=WITHOUT_FLASHINFER,
                env=env,
                backends=backends,
            )

    measure(benchmark, capsys, run, len(calls))


def test_detected_device_and_process_environment(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    table = carried_over("h100")
    monkeypatch.setattr("fp8moe.selector.detected_platform", lambda: WITHOUT_FLASHINFER)
    monkeypatch.setattr("fp8moe.measured.table.device_name_here", lambda: table.device.name)
    monkeypatch.setattr("fp8moe.measured.table.installed_versions", lambda *_: dict(table.versions))
    calls = [(*question, tokens) for question in questions(table) for tokens in range(1, 16384, 64)]

    def run() -> None:
        for config, weight_key, activation_key, tokens in calls:
            select_measured(config, weight_key, activation_key, tokens=tokens, table=table)

    measure(benchmark, capsys, run, len(calls))
