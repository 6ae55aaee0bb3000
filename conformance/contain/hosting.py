"""The parent's side of the servers: one for each way in which triton can be set up, started when first needed."""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from conformance.contain.jobs import SuiteError
from conformance.contain.server import FORK, PING, READY

_START = "import json,sys;c=json.loads(sys.argv[1]);sys.path[:]=c['path'];from conformance.contain.server import serve;"
_SHOWN = 4000
_ENDS_IN = 5.0
ANSWERS_IN = 10.0

SINGLE_THREADED = {
    "OPENBLAS_NUM_THREADS": "1",  # Triton's interpreter multiplies with numpy
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # a backend that asks for more threads leaves the others their time
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking whether there is a GPU must not open it before the fork
}


class Server:
    """A process to fork workers from."""

    def __init__(self, interpreter: bool) -> None:
        environment = {**os.environ, **SINGLE_THREADED}
        environment.pop("TRITON_INTERPRET", None)
        if interpreter:
            environment["TRITON_INTERPRET"] = "1"
        ours, theirs = socket.socketpair()
        told = json.dumps({"path": _path or _search_path()})
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{_START}serve({theirs.fileno()},{os.getpid()})", told],
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the parent's affair
            )
        self._control = ours
        self._is_ready = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, channel: socket.socket, control: socket.socket, output: int, seconds: float) -> None:
        """Asks for a worker with these descriptors.

        Raises:
            SuiteError: the server does not start.
            OSError: it has ended.
        """
        with self._lock:
            if not self._is_ready:
                self._wait_until_ready(seconds)
            socket.send_fds(self._control, [FORK], [channel.fileno(), control.fileno(), output])

    def _wait_until_ready(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        readable = bool(poll.poll(seconds * 1000))
        if readable and self._control.recv(len(READY)) == READY:
            self._is_ready = True
            return
        self._process.kill()
        assert self._process.stderr is not None
        text = self._process.stderr.read().decode(errors="replace")[-_SHOWN:]
        what = "ended before it was ready" if readable else f"was not ready within {seconds:g} s"
        raise SuiteError(f"the process that workers are forked from {what}:\n{text}")

    def answers(self) -> bool:
        """Whether it has not been killed, which may be so for a while before it ends."""
        with self._lock, suppress(OSError):
            self._control.sendall(PING)
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            if poll.poll(ANSWERS_IN * 1000) and self._control.recv(len(PING)) == PING:
                return True
        self._process.kill()
        self._process.wait()
        return False

    def close(self) -> None:
        """Ends it, and waits until it has ended."""
        self._control.close()
        try:
            self._process.wait(_ENDS_IN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def forget(self) -> None:
        """In a forked copy of the parent: its server is none of ours."""
        self._control.close()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._process.returncode = 0  # else its finaliser would wait for another's child


_path: list[str] = []
"""Where the modules of every server are looked for; empty: where this process looks when it starts one."""


def keep_path() -> None:
    """Servers look for modules where this process does now, whatever comes into `sys.path` later: pytest puts folders
    in front of it, where another module may have the name of one that this process has imported. One that looks
    elsewhere, for an earlier run in this process, ends."""
    path = _search_path()
    if path != _path:
        shutdown()
    _path[:] = path


def _search_path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]


_servers: dict[bool, Server] = {}
_lock = threading.Lock()


def server_for(interpreter: bool) -> Server:
    """The running server of this kind; a new one where it has ended."""
    with _lock:
        found = _servers.get(interpreter)
        if found is not None and not found.is_alive:
            found.close()
            found = None
        if found is None:
            found = _servers[interpreter] = Server(interpreter)
        return found


def shutdown() -> None:
    """Ends every server of this process; the next worker starts a new one, with the environment of then."""
    with _lock:
        _path.clear()
        while _servers:
            _servers.popitem()[1].close()


def _forget_servers() -> None:
    global _lock
    _lock = threading.Lock()
    while _servers:
        _servers.popitem()[1].forget()


atexit.register(shutdown)
os.register_at_fork(after_in_child=_forget_servers)
