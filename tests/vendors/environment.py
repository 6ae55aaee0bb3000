"""A virtual environment with wheels in it that were just built, which sees what is installed here: no network."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
NO_NETWORK = ("--no-index", "--disable-pip-version-check")
SEEN = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
"""Where torch and the rest are. Their .pth files are not read there, so that an editable fp8moe is not found."""


class Environment:
    """A virtual environment, and commands in it.

    Args:
        folder: where it is made.
        projects: folders with a pyproject.toml, whose wheels are built and installed.
    """

    def __init__(self, folder: Path, *projects: Path) -> None:
        self.bin = folder / "bin"
        venv.create(folder, with_pip=False, symlinks=True)
        wheels = folder / "wheels"
        for project in projects:
            build = ("wheel", *NO_NETWORK, "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels))
            done([sys.executable, "-m", "pip", *build, str(project)], self.variables(), folder)
        install = ("--python", str(self.bin / "python"), "install", *NO_NETWORK, "--no-deps")
        built = sorted(map(str, wheels.iterdir()))
        done([sys.executable, "-m", "pip", *install, *built], self.variables(), folder)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "seen.pth").write_text("".join(f"{entry}\n" for entry in SEEN))

    def variables(self) -> dict[str, str]:
        """Of its processes: its own programs first, and nothing of the checkout on the import path."""
        ours = ("PYTHONPATH", "PYTEST_", "TRITON_INTERPRET", "VLLM_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}

    def run(self, command: str, folder: Path, *, status: int = 0) -> subprocess.CompletedProcess[str]:
        """A line of shell, in a folder."""
        return done(["bash", "-euo", "pipefail", "-c", command], self.variables(), folder, status=status)

    def plain_pip(self) -> None:
        """A `pip` that builds with what is here, since there is no network to fetch a build system from."""
        options = f"{' '.join(NO_NETWORK)} --no-build-isolation"
        script = f'#!/bin/sh\ncommand=$1\nshift\nexec "{self.bin}/python" -m pip "$command" {options} "$@"\n'
        (self.bin / "pip").write_text(script)
        (self.bin / "pip").chmod(0o755)
        (self.bin / "pytest").write_text(f'#!/bin/sh\nexec "{self.bin}/python" -m pytest "$@"\n')
        (self.bin / "pytest").chmod(0o755)


def done(
    command: Sequence[str], variables: dict[str, str], folder: Path, *, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """A process that ended as it should.

    Raises:
        AssertionError: it ended otherwise; the text has what it said.
    """
    ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == status, f"{' '.join(command)}: status {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return ended
