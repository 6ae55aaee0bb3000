"""Runs tests/kernels in Triton's interpreter, so that the kernels are tested on a machine without a GPU too.

The interpreter is chosen when triton is imported, by an environment variable: so in a process of its own. Where there
is a GPU, the same files run on it as well, in the process that collected them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: tests/kernels runs by itself")
def test_kernels_in_the_interpreter() -> None:
    environment = {
        # Without the options of the run that we are part of, and on one core: numpy's threads cost more than they save.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(TESTS / "kernels")]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout.splitlines()[-1]
