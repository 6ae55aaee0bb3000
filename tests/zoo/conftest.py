"""Asks the suite for its verdicts on chosen cases: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FUSED = Version("3.9")
"""The first triton tried whose interpreter rounds `tl.fma` once: before it no interpreted kernel has the right bits."""
Verdicts = Callable[[Sequence[tuple[str, str, str]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def device() -> str:
    """Of the kernels, as `--fp8moe-device` names it."""
    return "cuda" if torch.cuda.is_available() else "interpreter"


@pytest.fixture(scope="session")
def verdicts(device: str, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """(zoo, fault or "" for the honest backend, case id) of each to what the suite says, asked in one process."""
    if device == "interpreter" and (triton_version() or FUSED) < FUSED:
        pytest.skip(f"the interpreter of triton before {FUSED} rounds tl.fma twice")

    def ask(which: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
        path = tmp_path_factory.mktemp("verdicts") / "cases.json"
        path.write_text(json.dumps(which), encoding="utf-8")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TRITON_INTERPRET"))}
        env["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, for the interpreter's dots: small, and its threads would wait
        command = [sys.executable, str(Path(__file__).with_name("verdicts.py")), device, str(path)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == len(which)
        return found

    return ask


def triton_version() -> Version | None:
    try:
        return Version(version("triton"))
    except PackageNotFoundError:
        return None
