"""The parent's side of one worker: its channel, its output, its keeper, and the watch over what it uses."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import select
import signal
import socket
import threading
import time
import weakref
from typing import Any

from conformance.contain import processes
from conformance.contain.channel import Incoming, NotAMessage, framed
from conformance.contain.hosting import ANSWERS_IN, server_for
from conformance.contain.inside import CHANNEL_LOST, WHERE
from conformance.contain.jobs import Cancelled, Limits, WorkerEnded
from conformance.contain.server import END, HERE, PATIENCE, PING

TICK = 0.02
"""Seconds between two looks at what a worker occupies."""
MOST_PROCESSES = 64
"""Below one worker; more is taken for forking without end."""
TAIL_BYTES = 1 << 14
SHOWN_OUTPUT = 300
PLACE_IN = 0.2
"""Seconds that a stuck worker gets to say where it is."""
EXIT_TOLD_IN = 2.0
ENDING_CHILDREN = 0.25
"""Seconds that a child process which is about to end gets for it."""
LASTING = ("torch/_inductor/compile_worker", "multiprocessing.resource_tracker", "multiprocessing/resource_tracker")
"""In the command lines of processes that libraries keep for themselves."""
FORK_SERVER = "from multiprocessing.forkserver import main"
"""In that of Python's own, which it keeps as well, from 3.14 on for every pool. So have what is forked from it, which a
backend has started, and which has it for a parent."""
_PLACE = re.compile(r'File "([^"]*)", line (\d+) in (\S+)')
_AT_ONCE = 1 << 16


class Handle:
    """A running worker.

    Args:
        cancelled: once it is set, no answer is waited for.

    Raises:
        SuiteError: the process that workers are forked from does not start.
        WorkerEnded: it ended before the worker was forked.
    """

    def __init__(self, interpreter: bool, limits: Limits, cancelled: threading.Event) -> None:
        self.limits = limits
        self.cancelled = cancelled
        self.server = server_for(interpreter)
        self._pids: tuple[int, int] | None = None
        self._exit: int | None = None
        self._keeper_text = b""
        self._keeper_gone = False
        self._answers = 0
        self._baseline = 0
        self._printed = 0
        self._tail = bytearray()
        self._looked = 0.0
        self._channel, channel = socket.socketpair()
        self._control, control = socket.socketpair()
        self._output, output = os.pipe()
        _open.add(self)
        self._channel.setblocking(False)
        self._control.setblocking(False)
        os.set_blocking(self._output, False)
        self._incoming = Incoming(self._channel)
        self._poll = select.poll()
        for descriptor in (self._channel.fileno(), self._control.fileno(), self._output):
            self._poll.register(descriptor, select.POLLIN)
        try:
            self.server.fork(channel, control, output, limits.start_seconds)
        except OSError as error:
            self.forget()
            raise WorkerEnded(f"the process that workers are forked from has ended ({error})", outside=True) from error
        except BaseException:
            self.forget()
            raise
        finally:
            channel.close()
            control.close()
            os.close(output)

    @property
    def is_alive(self) -> bool:
        """Not known to have ended; looks at what its keeper has written."""
        self._read_keeper()
        return self._exit is None and not self._keeper_gone

    def note_baseline(self) -> None:
        """What the worker occupies now is its own; a job is charged for what comes on top."""
        self._baseline = processes.resident_bytes(self.pid)

    @property
    def pid(self) -> int:
        return self._pids[1] if self._pids is not None else 0

    # -- asking --

    def send(self, message: tuple[object, ...], seconds: float) -> None:
        """A message to the worker.

        Raises:
            WorkerEnded: it does not take it.
        """
        self._drain()
        self._printed = 0
        self._tail.clear()
        self._channel.settimeout(seconds)
        try:
            self._channel.sendall(framed(pickle.dumps(message)))
        except TimeoutError:
            raise WorkerEnded(f"it did not take the next job within {seconds:g} s", hung=True) from None
        except OSError:
            raise self._lost_channel() from None
        finally:
            self._channel.setblocking(False)

    def wait(self, number: int, seconds: float) -> dict[str, Any]:
        """The next message about what was asked under a number.

        Raises:
            WorkerEnded: instead of it, the worker ended, or passed a limit and is to be ended.
            Cancelled: it is to be ended.
        """
        until = time.monotonic() + seconds
        while True:
            answer = self._next(number)
            if answer is not None:
                return answer
            if self.cancelled.is_set():
                raise Cancelled
            left = until - time.monotonic()
            if left <= 0:
                raise WorkerEnded(f"it did not end within {seconds:g} s{self._where()}", hung=True)
            for descriptor, _ in self._poll.poll(min(left, TICK) * 1000):
                if descriptor == self._output:
                    self._drain()
                elif descriptor == self._control.fileno():
                    self._read_keeper()
                elif not self._incoming.receive():
                    answer = self._next(number)
                    if answer is not None:
                        return answer
                    raise self._lost_channel()
            self._check_end()
            self._check_use()

    def _next(self, number: int) -> dict[str, Any] | None:
        try:
            for text in self._incoming.messages():
                message = json.loads(text)
                if not isinstance(message, dict) or message.get("pid") != self.pid:
                    raise WorkerEnded("something else than the worker wrote into the suite's channel")
                if message.get("number") == number:
                    return message
                # The suite answers each job once; whoever got at its channel answered one before.
                raise WorkerEnded("something else than the suite has answered an earlier job")
        except ValueError as error:
            why = str(error) if isinstance(error, NotAMessage) else "no JSON"
            raise WorkerEnded(f"it wrote into the suite's channel ({why})") from None
        return None

    # -- watching --

    def _check_end(self) -> None:
        if self._exit is not None:
            raise self._ended()
        if self._keeper_gone:
            raise WorkerEnded(
                "the process that watches over the worker was killed" + self._printed_last(), outside=True
            )

    def _check_use(self) -> None:
        if self._printed > self.limits.output_bytes:
            raise WorkerEnded(f"it printed more than {self.limits.output_bytes} bytes{self._printed_last()}")
        now = time.monotonic()
        if now - self._looked < TICK or self._pids is None:
            return
        self._looked = now
        below = processes.descendants(self._pids[0])
        if len(below) > MOST_PROCESSES:
            raise WorkerEnded(f"it started more than {MOST_PROCESSES} processes")
        limit = self.limits.memory_bytes
        if limit is None or not self._baseline:
            return
        most = max((processes.resident_bytes(pid) for pid in below), default=0) - self._baseline
        if most > limit:
            raise WorkerEnded(
                f"it occupied {most / 2**20:.0f} MiB of host memory above what a worker starts with, "
                f"of {limit / 2**20:.0f} MiB that it may"
            )

    def _drain(self) -> None:
        """Takes what was printed, no more at a time than a job may print."""
        taken = 0
        while taken <= self.limits.output_bytes:
            try:
                data = os.read(self._output, _AT_ONCE)
            except BlockingIOError:
                break
            if not data:  # whoever has it has closed it; it stays readable, and is polled no more
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._output)
                break
            taken += len(data)
            self._tail += data
            del self._tail[:-TAIL_BYTES]
        self._printed += taken

    def _read_keeper(self) -> None:
        try:
            data = self._control.recv(_AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if not self._keeper_gone:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._control.fileno())
            self._keeper_gone = True
        self._keeper_text += data
        *lines, self._keeper_text = self._keeper_text.split(b"\n")
        for line in lines:
            word, *numbers = line.split()
            if word == b"pids":
                self._pids = (int(numbers[0]), int(numbers[1]))
            elif word == HERE:
                self._answers += 1
            elif word == b"exit":
                self._exit = int(numbers[0])

    def _lost_channel(self) -> WorkerEnded:
        """The channel's other end is closed: because the worker has ended, as its keeper is about to tell, or not."""
        until = time.monotonic() + EXIT_TOLD_IN
        while self._exit is None and not self._keeper_gone and time.monotonic() < until:
            _wait_for(self._control.fileno(), TICK)
            self._read_keeper()
            if self._pids is not None and processes.is_living(self.pid) and time.monotonic() > until - EXIT_TOLD_IN / 2:
                break
        if self._exit is not None:
            return self._ended()
        if self._keeper_gone:
            return WorkerEnded("the process that watches over the worker was killed", outside=True)
        return WorkerEnded("it closed the suite's channel" + self._printed_last())

    def _ended(self) -> WorkerEnded:
        self._drain()
        status = self._exit
        assert status is not None
        if status == CHANNEL_LOST:
            return WorkerEnded("it closed the suite's channel" + self._printed_last())
        if status >= 0:
            return WorkerEnded(f"it ended the process with status {status}{self._printed_last()}")
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        said = f" ({signal.strsignal(-status)})" if signal.strsignal(-status) else ""
        return WorkerEnded(f"the process was killed by {name}{said}{self._place()}{self._printed_last()}")

    # -- telling --

    def _where(self) -> str:
        """Where a stuck worker is, by its own account."""
        if self.pid:
            processes.kill(self.pid, WHERE)
        until = time.monotonic() + PLACE_IN
        while not self._place() and time.monotonic() < until:
            _wait_for(self._output, PLACE_IN / 4)
            self._drain()
        return self._place()

    def _place(self) -> str:
        """The innermost frame that faulthandler wrote."""
        text = self._tail.decode(errors="replace")
        _, marker, stack = text.rpartition("(most recent call first):")
        found = _PLACE.search(stack) if marker else None
        return f", in {found[3]} at {os.path.basename(found[1])}:{found[2]}" if found else ""

    def _printed_last(self) -> str:
        text = self._tail.decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or _PLACE.search(text):
            return ""
        return f"; it printed last: {lines[-1][-SHOWN_OUTPUT:]!r}"

    def check_watchers(self) -> None:
        """Its keeper and its server run on: a backend can signal them, and has no business with them.

        Raises:
            WorkerEnded: one of them does not.
        """
        answers, until = self._answers, time.monotonic() + ANSWERS_IN
        with contextlib.suppress(OSError):
            self._control.send(PING)
        while self._answers == answers:
            _wait_for(self._control.fileno(), TICK)
            self._read_keeper()
            if self._keeper_gone:
                raise WorkerEnded("the process that watches over the worker was killed", outside=True)
            if self._pids is not None and processes.state(self._pids[0]) in ("T", "t"):
                raise WorkerEnded("the process that watches over the worker was stopped", outside=True)
            if time.monotonic() > until:
                raise WorkerEnded("the process that watches over the worker does not answer", outside=True)
        if not self.server.answers():
            raise WorkerEnded("the process that workers are forked from was killed", outside=True)

    def left_running(self) -> list[str]:
        """Command lines of living processes below the keeper other than the worker: what a backend has started."""
        until = time.monotonic() + ENDING_CHILDREN
        while True:
            found = self._others()
            if not found or time.monotonic() > until:
                return found
            time.sleep(TICK / 4)

    def _others(self) -> list[str]:
        if self._pids is None:
            return []
        keeper, worker = self._pids
        others = [pid for pid in processes.descendants(keeper) if pid != worker]
        commands = {pid: processes.command(pid) for pid in others if processes.is_living(pid)}
        return [text for pid, text in commands.items() if not _is_kept(pid, text, worker)]

    def printed(self) -> str:
        """The end of what was printed since the last message to the worker."""
        self._drain()
        return self._tail.decode(errors="replace")

    # -- ending --

    def end(self) -> None:
        """Kills the worker and all below it, and waits until they are gone."""
        if self._pids is not None:
            processes.kill(self._pids[0], signal.SIGCONT)  # a backend may have stopped it
        with contextlib.suppress(OSError):
            self._control.send(END)
        until = time.monotonic() + PATIENCE + EXIT_TOLD_IN
        while not self._keeper_gone and time.monotonic() < until:
            _wait_for(self._control.fileno(), TICK)
            self._read_keeper()
        if self._pids is not None and not self._keeper_gone:
            processes.kill(self._pids[0])  # the kernel then kills the worker
        self.forget()

    def forget(self) -> None:
        """Closes this process's ends."""
        if self in _open:
            _open.discard(self)
            self._channel.close()
            self._control.close()
            os.close(self._output)


def _is_kept(pid: int, command: str, worker: int) -> bool:
    """Whether a process below a worker is one that a library keeps."""
    if FORK_SERVER in command:
        return processes.parent(pid) == worker
    return any(part in command for part in LASTING)


def _wait_for(descriptor: int, seconds: float) -> None:
    """Until there is something to read, or not; `select` itself takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(seconds * 1000)


_open: weakref.WeakSet[Handle] = weakref.WeakSet()


def _forget_all() -> None:
    """In a forked copy of the parent, which would keep workers alive that lose theirs."""
    for handle in list(_open):
        handle.forget()


os.register_at_fork(after_in_child=_forget_all)
