"""The process that workers are forked from, and the keeper that stands between it and each worker.

    parent ── server ── keeper ── worker ── whatever a backend starts
       └────────────────── channel ──┘

The server has imported what judges and has not opened a device, so that a worker forked from it is ready at once. A
keeper waits for its one worker, tells the parent how that ended, and kills all that is left below it: it adopts
orphans, so nothing gets away. Each ends when the parent does, however the parent ends. A backend that kills its parent
kills a keeper, and a worker whose keeper ends is killed by the kernel.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from conformance.contain import processes

READY = b"ready"
FORK = b"fork"
PING = b"ping"
HERE = b"here"
END = b"end"
PATIENCE = 25.0
"""Seconds until a keeper gives up on processes that do not die: one that waits for a GPU can take so long."""
_PAUSE = 0.002
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def serve(control_fd: int, parent: int) -> None:
    """Forks a worker for each request, until the parent ends or closes its end. Never returns.

    A request comes with three descriptors: the worker's channel, the keeper's, and where the worker's output goes. What
    is killed may take a while to end; what answers a ping has not been killed yet.
    """
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    _preload()
    gc.collect()
    gc.freeze()  # a collection in a worker would write to pages that all of them share
    processes.adopt_orphans()
    control = socket.socket(fileno=control_fd)
    control.sendall(READY)
    watch = _Watch(control, parent)
    keepers: set[int] = set()
    while watch.wait():
        for pid in _ended():
            keepers.discard(pid)
        for pid in set(processes.children(os.getpid())) - keepers:
            if processes.is_living(pid):  # a backend's, whose keeper has been killed
                processes.kill(pid)
        if watch.readable:
            message, descriptors, _, _ = socket.recv_fds(control, len(FORK), 3)
            if not message:
                break
            if message == PING:
                control.sendall(PING)
                continue
            pid = os.fork()
            if pid == 0:
                _guarded(_keep, watch, *descriptors)
            keepers.add(pid)
            for descriptor in descriptors:
                os.close(descriptor)
    os._exit(0)


def _preload() -> None:
    import torch

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

    from conformance.contain import inside

    torch.set_num_threads(1)
    inside.remember()


def _guarded(body: Callable[..., None], *arguments: Any) -> None:
    """The rest of a forked process: nothing of the server's own ever runs in it."""
    try:
        body(*arguments)
    finally:
        os._exit(1)


class _Watch:
    """Waits for the parent, for its messages, and for children that end."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self.control = control
        self.parent = parent
        self.readable = False
        self._ending = processes.opened(parent)
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._poll = select.poll()
        for descriptor in (control.fileno(), self._woken, self._ending):
            if descriptor is not None:
                self._poll.register(descriptor, select.POLLIN)

    def wait(self) -> bool:
        """False once the parent has ended; `readable` says whether it has written, or closed its end."""
        events = {descriptor for descriptor, _ in self._poll.poll()}
        if self._woken in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 1 << 12)
        self.readable = self.control.fileno() in events
        return self._ending not in events

    def close(self) -> None:
        """What a forked process has no use for."""
        signal.set_wakeup_fd(-1)
        self.control.close()
        for descriptor in (self._woken, self._wake, self._ending):
            if descriptor is not None:
                os.close(descriptor)


def _ended() -> dict[int, int]:
    """Children that have ended, with -signal or their status; waited for."""
    found = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found[pid] = os.waitstatus_to_exitcode(status)
    return found


def _keep(inherited: _Watch, channel: int, control_fd: int, output: int) -> None:
    """A keeper: one worker, and the end of all that comes of it."""
    inherited.close()
    os.setsid()
    processes.adopt_orphans()
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.close(control_fd)
        _guarded(_become_worker, channel, output, keeper)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for descriptor in (channel, output, nowhere):
        os.close(descriptor)
    control = socket.socket(fileno=control_fd)
    watch = _Watch(control, inherited.parent)
    with contextlib.suppress(OSError):  # the parent may have ended
        control.sendall(f"pids {keeper} {worker}\n".encode())
        while watch.wait():
            ended = _ended()
            if worker in ended:
                control.sendall(f"exit {ended[worker]}\n".encode())
            if watch.readable:
                asked = control.recv(len(PING + END))
                if not asked or asked.endswith(END):
                    break
                control.sendall(HERE + b"\n")
    _kill_all(worker)
    os._exit(0)


def _kill_all(worker: int) -> None:
    """The worker, its group, and whatever else is below this process."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        below = processes.descendants(os.getpid())
        if worker in below:
            processes.kill_group(worker)
        for pid in below:
            processes.kill(pid)
        _ended()
        if not processes.children(os.getpid()):
            return
        time.sleep(_PAUSE)


def _become_worker(channel: int, output: int, keeper: int) -> None:
    processes.die_with_parent()
    if os.getppid() != keeper:
        os._exit(1)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for descriptor in (nowhere, output):
        os.close(descriptor)
    for number in (*_DEAF_TO, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    from conformance.contain.inside import work

    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (the worker's for as long as it lives)
    work(channel)
