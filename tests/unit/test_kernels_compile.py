"""Every kernel compiles for devices that are not here, fits their shared memory, and uses the instructions declared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
SHARED_KIB = {"sm89": 99, "sm90": 227, "gfx942": 64}
COMPILED = ("sm90", "sm89:gemm", "gfx942:gemm")
"""Targets, and where a prefix follows, of which variants: only the GEMM's instructions and stages differ by device."""

Report = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def report() -> Report:
    if sys.platform != "linux":
        pytest.skip("triton is a package for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(CHECKOUT / "tests" / "kernels" / "compile_kernels.py"), *COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Report = json.loads(done.stdout)
    return found


def test_every_kernel_is_there() -> None:
    """No jit function with a launch is left out of the table of variants."""
    kernels = CHECKOUT / "fp8moe" / "kernels"
    source = "".join(path.read_text() for path in sorted(kernels.glob("*.py")))
    launched = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    table = (kernels / "variants.py").read_text()
    assert [name for name in launched if f".{name}" not in table] == []
    assert len(launched) >= 8


def test_fits_the_shared_memory(report: Report) -> None:
    for target, variants in report.items():
        for name, found in variants.items():
            assert found["shared"] <= SHARED_KIB[target] * 1024, (target, name)


WIDENED = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
ADA = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
SMALL_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
SMALL_FP16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
WGMMA = "wgmma.mma_async.sync.aligned.m64n128"
WGMMA_64 = "wgmma.mma_async.sync.aligned.m64n64"


@pytest.mark.parametrize(
    ("target", "variant", "instruction"),
    [
        *[("sm90", f"gemm_{scales}_16", WIDENED) for scales in ("block", "row")],
        *[
            ("sm90", f"{deep}gemm_{scales}_64", f"{WGMMA}k32.f32.e4m3.e4m3")
            for scales in ("block", "row")
            for deep in ("", "deep_")
        ],
        *[("sm90", f"gemm_{scales}_64_short", f"{WGMMA_64}k32.f32.e4m3.e4m3") for scales in ("block", "row")],
        ("sm90", "gemm_bf16_16", SMALL_BF16),
        ("sm90", "gemm_fp16_16", SMALL_FP16),
        ("sm90", "gemm_bf16_64", f"{WGMMA}k16.f32.bf16.bf16"),
        ("sm90", "gemm_fp16_64", f"{WGMMA}k16.f32.f16.f16"),
        *[("sm89", f"gemm_{scales}_{rows}", ADA) for scales in ("block", "row") for rows in (16, 64)],
        *[("sm89", f"gemm_bf16_{rows}", SMALL_BF16) for rows in (16, 64)],
        *[("sm89", f"gemm_fp16_{rows}", SMALL_FP16) for rows in (16, 64)],
        # e4m3fn is widened on CDNA3, hence nothing is declared there.
        *[("gfx942", f"gemm_{scales}_16", "v_mfma_f32_16x16x16_f16") for scales in ("block", "row", "fp16")],
        *[("gfx942", f"gemm_{scales}_64", "v_mfma_f32_32x32x8_f16") for scales in ("block", "row", "fp16")],
        ("gfx942", "gemm_bf16_16", "v_mfma_f32_16x16x16_bf16"),
        ("gfx942", "gemm_bf16_64", "v_mfma_f32_32x32x8_bf16"),
    ],
)
def test_the_matrix_instruction(target: str, variant: str, instruction: str, report: Report) -> None:
    """What `fp8moe.backends.triton_arithmetic` declares rests on these."""
    found = report[target][variant]["instructions"]
    assert [name for name in found if name.startswith(("mma.", "wgmma.mma", "v_mfma"))] == [instruction]


@pytest.mark.parametrize("scales", ["block", "row"])
def test_each_128_of_k_starts_from_zero(scales: str, report: Report) -> None:
    """Of the four wgmma of a step the first ignores the accumulator; unscaled, a sum over all of K never does."""
    for variant in (f"gemm_{scales}_64", f"deep_gemm_{scales}_64", f"gemm_{scales}_64_short"):
        assert report["sm90"][variant]["starts"] == ["0", "p", "p", "p"], variant
    assert report["sm90"]["gemm_bf16_64"]["starts"] == ["p", "p", "p", "p"]


@pytest.mark.parametrize("target", ["sm89", "sm90"])
def test_arithmetic_is_ieee(target: str, report: Report) -> None:
    """No approximation, no flush of subnormals, and every product and sum rounded as written."""
    for variant, found in report[target].items():
        for name in found["instructions"]:
            assert not {"approx", "full", "ftz"} & set(name.split(".")), (variant, name)
            if name.startswith(("add.", "sub.", "mul.", "div.", "fma.", "mad.")) and name.endswith(".f32"):
                assert ".rn." in name, (variant, name)
