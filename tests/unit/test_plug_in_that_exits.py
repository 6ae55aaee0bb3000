"""An installed package whose module ends the process when it is imported: as the tutorial for vendors has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fp8moe

CHECKOUT = Path(fp8moe.__file__).parents[1]
ENDED = 3


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with two packages, one of which exits."""
    for name, code in {
        "exits": f"import os\nos._exit({ENDED})\n",
        "stays": "from fp8moe.backends.torch_experts import TorchExperts\n\n\nclass Stays(TorchExperts):\n    pass\n",
    }.items():
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (tmp_path / f"{name}.py").write_text(code)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[fp8moe.backends]\n{name.upper()} = {name}:{name.title()}\n")
    return tmp_path


def command(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CHECKOUT), str(installed)])
    line = [sys.executable, "-m", "fp8moe", *arguments]
    return subprocess.run(
        line, env=os.environ | {"PYTHONPATH": path}, cwd=installed, capture_output=True, text=True, check=False
    )


def test_whoever_asks_what_is_selected_ends_with_it(installed: Path) -> None:
    done = command(installed, "platform")
    assert (done.returncode, done.stdout, done.stderr) == (ENDED, "", "")


@pytest.mark.parametrize(("backend", "status"), [("EXITS", 1), ("STAYS", 1), ("stays:Stays", 0)])
def test_a_worker_tells_it_of_whatever_is_registered(installed: Path, backend: str, status: int) -> None:
    done = command(installed, "repro", "v1:M=1,H=128,I=128,E=2", "--backend", backend, "--device", "cpu")
    assert done.returncode == status, done.stdout + done.stderr
    assert (f"it ended the process with status {ENDED}" in done.stdout) == bool(status)
