"""Every kernel compiles for devices that are not here, fits their shared memory, and uses the instructions declared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
SHARED_KIB = {"sm89": 99, "sm90": 227, "gfx942": 64}
KERNELS = ("quantize", "gemm16", "gemm64", "silu", "reduce")

Report = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def report() -> Report:
    if sys.platform != "linux":
        pytest.skip("triton is a package for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(CHECKOUT / "tests" / "kernels" / "compile_kernels.py"), *SHARED_KIB]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Report = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("target", SHARED_KIB)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_within_shared_memory(kernel: str, target: str, report: Report) -> None:
    assert report[target][kernel]["shared"] <= SHARED_KIB[target] * 1024


@pytest.mark.parametrize(
    ("target", "kernel", "instruction"),
    [
        ("sm90", "gemm16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("sm90", "gemm64", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("sm89", "gemm16", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        ("sm89", "gemm64", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        ("gfx942", "gemm16", "v_mfma_f32_16x16x16_f16"),  # e4m3fn is widened there, hence nothing is declared
        ("gfx942", "gemm64", "v_mfma_f32_32x32x8_f16"),
    ],
)
def test_the_matrix_instruction(target: str, kernel: str, instruction: str, report: Report) -> None:
    """What `fp8moe.backends.triton_arithmetic` declares rests on these."""
    found = report[target][kernel]["instructions"]
    assert [name for name in found if name.startswith(("mma.", "wgmma.mma", "v_mfma"))] == [instruction]


@pytest.mark.parametrize("target", ["sm89", "sm90"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_arithmetic_is_ieee(kernel: str, target: str, report: Report) -> None:
    """No approximation, no flush of subnormals, and every product and sum rounded as written."""
    for name in report[target][kernel]["instructions"]:
        assert ".approx" not in name
        assert ".full" not in name
        assert ".ftz" not in name
        if name.startswith(("add.", "sub.", "mul.", "div.", "fma.", "mad.")) and name.endswith(".f32"):
            assert ".rn." in name
