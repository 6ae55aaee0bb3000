"""`fp8moe repro` of backends that do not come to an end, or do more than compute: the command tells it, and lives."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.commands import repro
from fp8moe.commands.question import BadInput
from tests.unit.command_line import no_variables, python, run  # noqa: F401 (a fixture)

CASE = "v1:E=4,H=128,I=128,M=3"


class Segfaults(TorchExperts):
    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


class Exits(TorchExperts):
    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        os._exit(0)


class SysExits(TorchExperts):
    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        sys.exit(0)


class RaisesAnything(TorchExperts):
    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("\x1b[31m\n\ud800" + "x" * (1 << 26))


class Hangs(TorchExperts):
    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        while True:
            time.sleep(1)


class Prints(TorchExperts):
    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        sys.stdout.write("x" * (8 << 20))
        sys.stdout.flush()
        return super().apply(*args, **kwargs)


class SecondCase(TorchExperts):
    """Fails from the second case of a process on."""

    made = 0

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = super().apply(*args, **kwargs)
        return result * 2 if SecondCase.made > 1 else result

    def __init__(self, *args: Any) -> None:
        SecondCase.made += 1
        super().__init__(*args)


class WrongConstructor(TorchExperts):
    def __init__(self, config: Any) -> None:
        pass


class RaisesBelow(TorchExperts):
    def __init__(self, *_: Any) -> None:
        self.torch_raises()

    def torch_raises(self) -> None:
        torch.nn.functional.linear(torch.zeros(2, 3), torch.zeros(4, 5))


def again(backend: type, *options: str, status: int = 1) -> str:
    named = f"tests.unit.test_repro_contained:{backend.__name__}"
    return str(run("repro", CASE, "--backend", named, "--device", "cpu", *options, status=status).stdout)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (Segfaults, "status: failed: the process was killed by SIGSEGV (Segmentation fault), in apply at test_repro_c"),
        (Exits, "status: failed: it ended the process with status 0\n"),
        (SysExits, "status: failed: apply raised SystemExit: 0 at test_repro_c"),
        (RaisesAnything, r"status: failed: apply raised RuntimeError: \x1b[31m \ud800xxx"),
        (Prints, "status: failed: it printed more than 1048576 bytes"),
    ],
)
def test_what_ends_the_worker_is_the_verdict(backend: type, told: str) -> None:
    assert told in again(backend)


def test_what_exits_as_it_is_imported_is_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits_at_once.py").write_text("import os\nos._exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    code = f"sys.path.insert(0, {str(tmp_path)!r}); from fp8moe.cli import main; main()"
    done = python(code, "repro", CASE, "--backend", "exits_at_once:Any", "--device", "cpu")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "status: failed: it ended the process with status 0" in done.stdout


def test_what_hangs_is_given_the_seconds_that_it_is_given() -> None:
    assert "status: failed: it did not end within 15 s, in apply at test_repro_contained.py" in again(
        Hangs, "--seconds", "15"
    )
    with pytest.raises(BadInput, match="--seconds 1: a limit of the worker's; leave it out with --here"):
        repro.reproduced(CASE, repro.Given("TorchExperts", "cpu", seconds=1, here=True))


def test_of_what_ended_its_process_the_case_can_be_written(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the tensors of a case are written by safetensors")
    path = tmp_path / "case.safetensors"
    assert f"tensors: {path}" in again(Exits, "--dump", str(path))
    with safetensors.safe_open(path, "pt") as file:
        assert "hidden_states" in file.keys()  # noqa: SIM118 (no mapping)
        assert "got" not in file.keys()  # noqa: SIM118
        assert file.metadata()["reason"] == "it ended the process with status 0"


def test_a_second_run_in_the_process_counts_too() -> None:
    assert "status: failed: run a second time in its process: " in again(SecondCase)


def test_in_this_process_for_a_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecondCase, "made", 0)
    assert "status: passed" in again(SecondCase, "--here", status=0)
    made = SecondCase.made
    assert made
    again(SecondCase)
    assert SecondCase.made == made


def test_a_constructor_that_takes_something_else_has_no_place_in_the_suite() -> None:
    told = again(WrongConstructor)
    (line,) = [line for line in told.splitlines() if line.startswith("status: ")]
    assert line.endswith("takes 2 positional arguments but 4 were given")


def test_the_place_is_the_backends_own_and_the_traceback_is_whole() -> None:
    told = again(RaisesBelow)
    line = RaisesBelow.torch_raises.__code__.co_firstlineno + 1
    (status,) = [text for text in told.splitlines() if text.startswith("status: ")]
    assert status.endswith(f" at test_repro_contained.py:{line}")
    assert "Traceback (most recent call last):" in told
    assert ", in torch_raises" in told
