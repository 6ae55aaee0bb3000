"""Runs tests/kernels in Triton's interpreter, so that the kernels are tested on a machine without a GPU too.

The interpreter is chosen when triton is imported, by an environment variable: so in a process of its own. Where there
is a GPU, the same files run on it as well, in the process that collected them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.version import Version

TESTS = Path(__file__).parents[1]
FUSED = Version("3.9")
"""The first triton tried whose interpreter rounds `tl.fma` once; 3.6 rounds it twice."""


def triton_version() -> Version | None:
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        with contextlib.suppress(PackageNotFoundError):
            return Version(version(name))
    return None


@pytest.mark.skipif(triton_version() is None, reason="triton is not installed")
@pytest.mark.skipif(
    (triton_version() or FUSED) < FUSED, reason=f"the interpreter of triton before {FUSED} rounds tl.fma twice"
)
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: tests/kernels runs by itself")
def test_kernels_in_the_interpreter() -> None:
    # Without the options of the run that we are part of.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, for its dots: they are small, and its threads would wait
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(TESTS / "kernels")]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout.splitlines()[-1]
