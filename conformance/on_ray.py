"""The shards of a run as tasks of a Ray cluster, which runs one again if its node is lost.

What goes to a task and what comes back are texts. Ray itself pickles them, and the tasks by their names, between nodes
that trust each other; a report is read here as one from a file is. Every node needs fp8moe and the backend installed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from conformance.certificate.surroundings import surroundings
from conformance.certification import check_backend
from conformance.contain import Limits, SuiteError
from conformance.kept_text import MOST_BYTES
from conformance.planned import BadRequest
from conformance.report import Report
from conformance.shards import Shard
from conformance.waivers import parse_waivers
from conformance.waivers.release import release_here

AUTO, LOCAL = "auto", "local"
RETRIES = 3
"""Of a task whose node or process is lost."""
ANSWERS_IN = 5.0
POLL = 1.0
"""Seconds between looks at Ctrl-C while tasks run."""
GPU, CPU, TYPE = "GPU", "CPU", "accelerator_type:"
"""Ray's names of resources."""
WHOLE = ""
"""In place of a shard: what is of the whole run."""


class ClusterError(ValueError):
    """No cluster there, none that can run this, or a task that came to no report; the text says what to do."""


class TaskLost(ClusterError):
    """A task whose node or process was lost each time that it was run."""


@dataclass(frozen=True)
class Asked:
    """What is run, as `check_backend` takes it.

    Args:
        waivers: the text of their file.
        seconds: of one case; None: the plain limits.
    """

    origin: str
    level: str
    seed: int
    device: str | None
    waivers: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Placement:
    """What one task takes of a node.

    Args:
        options: of a task, in Ray's words.
        places: how many run at the same time.
        kind: of place, in words.
    """

    options: Mapping[str, Any]
    places: int
    kind: str


@dataclass(frozen=True)
class Ended:
    """A task that came to its end.

    Args:
        shard: "K/N", or WHOLE.
        node: in words.
        seconds: it took there.
        report: as JSON.
        surroundings: of the whole run, what `conformance.certificate.surroundings.surroundings` says there, as JSON.
    """

    shard: str
    node: str
    seconds: float
    report: str
    surroundings: str


def run_piece(asked: Asked, shard: str, before: str) -> dict[str, Any]:
    """In a task: what `Ended` holds.

    Args:
        before: the report to go on with, as JSON; "" for none.
    """
    import ray

    begun = time.monotonic()
    report = check_backend(
        asked.origin,
        level=asked.level,
        device=asked.device,
        seed=asked.seed,
        resume=Report.from_json(before) if before else None,
        waivers=None if asked.waivers is None else parse_waivers(asked.waivers),
        shard=Shard.parse(shard) if shard else None,
        workers=1 if asked.device == "cpu" else None,
        limits=None if asked.seconds is None else Limits(seconds=asked.seconds),
    )
    return {
        "shard": shard,
        "node": f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})",
        "seconds": time.monotonic() - begun,
        "report": report.to_json(),
        "surroundings": "" if shard else json.dumps(surroundings(report.origin, release_here(report))),
    }


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """
    Args:
        address: as `ray.init` takes it: "auto", "local", "host:port".

    Raises:
        ClusterError: Ray is not installed, or no cluster is there.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        options["include_dashboard"] = False
        if "RAY_AUTH_MODE" not in os.environ:  # Ray would make a token that stays in the user's home
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray  # reads the variables
    except ImportError as error:
        raise ClusterError(f"Ray is not installed ({error}): pip install 'fp8moe[ray]'") from None
    _must_answer(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, **options)
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself, and would end the process
            signal.signal(number, handler)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        token = "where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        raise ClusterError(f"{address}: {error}; {token}") from None
    try:
        yield Cluster()
    finally:
        ray.shutdown()


def _must_answer(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    asked = os.environ.get("RAY_ADDRESS", "") if address == AUTO else address
    try:
        parts = urlsplit(asked if "://" in asked else f"//{asked}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return  # Ray says what is wrong with it
    if host is None or port is None:
        return
    try:
        socket.create_connection((host, port), timeout=ANSWERS_IN).close()
    except OSError as error:
        told = f"nothing answers there ({error}); start a cluster with `ray start --head`, or name another address"
        raise ClusterError(f"{asked}: {told}") from None


class Cluster:
    """The cluster that this process is connected to."""

    @property
    def nodes(self) -> list[Mapping[str, float]]:
        """What each node that is alive has of each resource."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def run(self, asked: Asked, pieces: Mapping[str, str], placement: Placement) -> Iterator[Ended]:
        """Each piece when it has come to its end. Those that have not are ended by Ray when this process leaves the
        cluster; `ray.cancel` would be of no further use, and in Ray 2.60 it can abort this process where a task is just
        coming to its end ("Tried to complete task that was not pending").

        Args:
            pieces: by shard, or WHOLE, the report to go on with, "" for none.

        Raises:
            TaskLost: with its node, more often than RETRIES.
            ClusterError: what a task was asked for cannot be.
            conformance.contain.SuiteError: an exception of the suite's own in a task.
        """
        import ray

        task = ray.remote(run_piece).options(**placement.options, max_retries=RETRIES)
        waiting = {task.remote(asked, shard, before): shard for shard, before in pieces.items()}
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=POLL)
            for reference in ended:
                yield _result(reference, waiting.pop(reference))

    def run_one(self, asked: Asked, shard: str, before: str, placement: Placement) -> Ended:
        """As `run`, of one piece."""
        return next(self.run(asked, {shard: before}, placement))


def _result(reference: Any, shard: str) -> Ended:
    from ray import get
    from ray.exceptions import RayError, RayTaskError

    what = f"shard {shard}" if shard else "what is of the whole run"
    try:
        found = Ended(**get(reference))
    except RayTaskError as error:
        if isinstance(error.cause, SuiteError):
            raise SuiteError(f"{what}: {error.cause}") from None
        cause = error.cause
        if isinstance(cause, BadRequest):
            told = f"{cause.value}: {cause.told}" if cause.argument else str(cause)
        else:
            told = f"{type(cause).__name__}: {cause}"
        raise ClusterError(f"{what}: {told}") from None
    except RayError as error:
        told = str(error).strip().splitlines()[0]
        raise TaskLost(f"{what}: {told}; it was run {RETRIES + 1} times at most") from None
    if len(found.report) > MOST_BYTES:
        raise ClusterError(f"{what}: {len(found.report):,} characters from {found.node}: that is no report")
    try:
        report = Report.from_json(found.report)
    except ValueError as error:
        raise ClusterError(f"{what}: from {found.node}: {error}") from None
    if report.shard != shard:
        raise ClusterError(f"{what}: from {found.node} came a report of shard {report.shard[:20]!r}")
    return found


def placement_on(nodes: Sequence[Mapping[str, float]], device: str | None, accelerator: str | None) -> Placement:
    """A GPU for each task, all of one type, since a certificate is of one device; on the CPU, a core.

    Args:
        nodes: what each has of each resource.
        device: as `check_backend` takes it.
        accelerator: Ray's name of the type of GPU; None: the one that there is.

    Raises:
        ClusterError: there is no such place, or GPUs of several types.
    """
    if device == "cpu":
        if accelerator is not None:
            raise ClusterError(f"accelerator {accelerator}: a type of GPU, so not with --device cpu")
        cores = sum(int(node.get(CPU, 0)) for node in nodes)
        if not cores:
            raise ClusterError("no node of the cluster has a CPU core for tasks: start one with `ray start --num-cpus`")
        return Placement({"num_cpus": 1}, cores, "CPU cores")
    found: Counter[str] = Counter()
    for node in nodes:
        names = [name.removeprefix(TYPE) for name in node if name.startswith(TYPE)]
        found[names[0] if names else ""] += int(node.get(GPU, 0))
    gpus = {name: count for name, count in sorted(found.items()) if count}
    if not gpus:
        raise ClusterError("no node of the cluster has a GPU: --device cpu, or start nodes that have")
    told = ", ".join(f"{count} of type {name or 'unknown'}" for name, count in gpus.items())
    if accelerator is not None and accelerator not in gpus:
        raise ClusterError(f"accelerator {accelerator}: the cluster's GPUs are {told}")
    if accelerator is None and len(gpus) > 1:
        raise ClusterError(f"the cluster's GPUs are {told}: a certificate is of one device; name its type")
    chosen = next(iter(gpus)) if accelerator is None else accelerator
    pinned = {"accelerator_type": chosen} if chosen else {}
    return Placement({"num_gpus": 1, **pinned}, gpus[chosen], f"GPUs of type {chosen}" if chosen else "GPUs")
