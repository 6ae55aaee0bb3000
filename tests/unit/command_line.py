"""Running the command line in tests: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fp8moe
from fp8moe import cli
from fp8moe.envs import SELECTOR_VARIABLES


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SELECTOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def explain(*arguments: str, status: int = 0) -> Any:
    """The parsed answer of `fp8moe explain --json`."""
    return json.loads(run("explain", "--json", *arguments, status=status).stdout)


def python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(Path(fp8moe.__file__).parents[1])!r})\n"
    command = [sys.executable, "-c", path + code, *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
