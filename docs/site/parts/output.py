"""What a command prints, run when the site is built; for those whose answer depends on the code alone."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from parts.markdown import fenced

WIDTH = "120"


def output(command: str) -> str:
    """
    Args:
        command: as a reader types it, beginning with `fp8moe`.

    Raises:
        ValueError: another program, or an exit status other than 0.
    """
    program, *arguments = shlex.split(command)
    if program != "fp8moe":
        raise ValueError(f"{command}: expected a command of fp8moe")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ended = subprocess.run(
        [sys.executable, "-m", "fp8moe", *arguments],
        env={**env, "PYTHONPATH": path, "COLUMNS": WIDTH, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise ValueError(f"{command}: exit status {ended.returncode}: {ended.stderr.strip()}")
    return f"{fenced([command], 'sh')}\n\n{fenced([line.rstrip() for line in ended.stdout.splitlines()])}"
