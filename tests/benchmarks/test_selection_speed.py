"""How many selections a second: warm frozen inputs, and os.environ with a configuration made anew each time.

Every case goes through all rules to the scan, and all three endings are there: a choice early, a choice late, NONE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conformance.selection.axes import SCHEMES
from conformance.selection.build import BATCHED, SINGLE, make_config
from fp8moe import PLATFORMS, FusedMoEConfig, Platform, select_fp8_moe_backend
from fp8moe.registry import default_backends

pytest.importorskip("pytest_benchmark")

ROUNDS = 20
REPEATS = 200
"""Times that one round goes through the cases: long against the clock, short against the other users of a machine."""
STRICT = bool(os.environ.get("FP8MOE_BENCH_STRICT"))
"""With FP8MOE_BENCH_STRICT the targets are asserted. Without it nothing is: CI machines share their cores, and a figure
that depends on the neighbours would make the test fail for reasons that are not in the code."""

DEVICES = ("h100", "b200", "l40s", "a100", "mi300x", "cpu")
FITS = {"cpu": ("block", "tensor_static"), "a100": ("channel_tok",)}


def cases() -> Iterator[tuple[Platform, str, Any]]:
    for name in DEVICES:
        for scheme in FITS.get(name, ("block", "tensor_static", "channel_tok")):
            for parallel in (SINGLE,) if name == "a100" else (SINGLE, BATCHED):
                yield PLATFORMS[name], scheme, parallel


def measure(
    benchmark: Any, capsys: pytest.CaptureFixture[str], run: Callable[[], None], calls: int, target: int
) -> None:
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled:  # by --benchmark-disable, and by pytest-xdist: the calls ran, unmeasured
        return
    rate = calls / benchmark.stats.stats.median
    benchmark.extra_info["selections_per_second"] = round(rate)
    with capsys.disabled():
        print(f"\n{benchmark.name}: {rate:,.0f} selections/s (target {target:,})")
    if STRICT:
        assert rate >= target


def test_warm_frozen_inputs(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    backends = tuple(default_backends())
    env: dict[str, str] = {}
    calls = [(make_config(parallel=parallel), *SCHEMES[s], platform) for platform, s, parallel in cases()] * REPEATS

    def run() -> None:
        select = select_fp8_moe_backend
        for config, weight_key, activation_key, platform in calls:
            select(config, weight_key, activation_key, False, platform=platform, env=env, backends=backends)

    measure(benchmark, capsys, run, len(calls), 300_000)


def test_process_environment_and_fresh_configuration(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    calls = [(make_config(parallel=parallel), *SCHEMES[s], platform) for platform, s, parallel in cases()] * REPEATS
    fields = [(config.__dict__, *rest) for config, *rest in calls]
    names = FusedMoEConfig.__dataclass_fields__
    fresh = [tuple(values[name] for name in names) for values, *_ in fields]

    def run() -> None:
        select = select_fp8_moe_backend
        for values, (_, weight_key, activation_key, platform) in zip(fresh, calls, strict=True):
            select(FusedMoEConfig(*values), weight_key, activation_key, platform=platform)

    measure(benchmark, capsys, run, len(calls), 100_000)
