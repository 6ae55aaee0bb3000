"""`pytest` with the plug-in, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = ("-p", "conformance.plugin", "-p", "no:cacheprovider", "--pyargs", "conformance")
"""The suite without a checkout: from another folder, by the package's name."""
QUICK = ("-m", "computes", "--fp8moe-device=cpu", "--fp8moe-scheme=block", "-k", "pinned")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder`, with the checkout and the folder on its path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TRITON_", "PYTEST_"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def run_suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "pytest", *SUITE, *options)


def results_of(report: Path) -> list[tuple[str, str, str]]:
    """Backend, case or check, and status of each result of a report."""
    return sorted(
        (r["backend"], r.get("case", r["check"]), r["status"]) for r in json.loads(report.read_text())["results"]
    )
