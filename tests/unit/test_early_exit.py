"""The watch over `os._exit`: which calls it changes, and which it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

WATCHED = """
import os, threading
from conformance.early_exit import EarlyExit
real = os._exit
watch = EarlyExit(lambda: print("released"), lambda: "a test")
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("os._exit(7)", 7),
        ("os._exit(0)", 1),  # SystemExit with a text
        ("os._exit(256)", 1),  # of which the system takes the lowest eight bits
        ("t = threading.Thread(target=lambda: os._exit(0)); t.start(); t.join(); real(9)", 1),
        ("t = threading.Thread(target=lambda: os._exit(5)); t.start(); t.join(); real(9)", 5),
        ("watch.status = 4; watch.end(); os._exit(0)", 4),
        ("watch.end(); os._exit(0)", 1),  # the run did not come to a status
        ("watch.status = 0; watch.end(); assert os._exit is real; os._exit(0)", 0),
        ("pid = os.fork(); pid or os._exit(0); real(8 + os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))", 8),
    ],
)
def test_status_of_the_process(code: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED + code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_a_thread_is_told_of() -> None:
    """What was captured is given back first."""
    code = "t = threading.Thread(target=lambda: os._exit(0)); t.start(); t.join()"
    done = subprocess.run([sys.executable, "-c", WATCHED + code], capture_output=True, text=True, check=False)
    assert done.stdout == "released\n"
    assert "fp8moe: os._exit(0) was called" in done.stderr
    assert "by a thread at <string>:6, during a test; it ends with status 1" in done.stderr
