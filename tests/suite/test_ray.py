"""`fp8moe certify --ray` on a cluster of two nodes on this machine: one is killed, and a run is interrupted."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conformance.certificate.statement import EVIDENCE
from conformance.contain.processes import PROC, command, kill
from conformance.editions import target_of
from conformance.levels import items_for
from tests.suite.ray_tasks import NODE, STARTS
from tests.unit.certificates import SMALL, cases_of

BACKEND = "tests.unit.certificates:BlockAlone"
ASKED = ("certify", BACKEND, "--device", "cpu", "--edition", SMALL.edition)
SECONDS = 120.0
"""That anything here may take."""
HERE = "127.0.0.1"
QUIET = (
    f"--node-ip-address={HERE}",
    "--num-cpus=1",
    f"--object-store-memory={80 << 20}",
    "--disable-usage-stats",
    "--block",
)
GPU = {"accelerator_type:H100": 1}
"""A node says that it has one; what it has is not asked before a task is there."""
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""A node that does not answer for two seconds is lost."""

pytestmark = [
    pytest.mark.skipif("FP8MOE_SLOW" not in os.environ, reason="a minute; run where FP8MOE_SLOW is set, as in CI"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"),
]


@dataclass
class Nodes:
    """A cluster on this machine, each node a session of processes of its own.

    Args:
        folder: of these tests.
        short: of Ray's sockets, whose paths may have 107 characters.
        environment: of every process.
        address: of the first node.
    """

    folder: Path
    short: str
    environment: dict[str, str]
    address: str
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self) -> None:
        """Those that do not run."""
        port = self.address.rpartition(":")[2]
        first = ("--head", f"--port={port}", "--num-gpus=0", "--include-dashboard=false", f"--temp-dir={self.short}")
        self._start("first", *first, f"--system-config={json.dumps(SOON)}")
        self._start("second", f"--address={self.address}", "--num-gpus=1", f"--resources={json.dumps(GPU)}")

    def _start(self, name: str, *options: str) -> None:
        if name in self.processes:
            return
        log = Path(self.short, f"{name}.log")
        with log.open("w") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *QUIET, *options],
                env={**self.environment, NODE: name},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        wait_until(lambda: "Ray runtime started" in log.read_text(), lambda: f"{name}: {log.read_text()}")

    def kill(self, name: str) -> None:
        """As where a machine loses its power: every process of the node, since a task can outlive its node's Ray."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while left := self.left_running(name):
            for pid in left:
                kill(pid)

    def starts(self) -> list[tuple[str, str]]:
        """(shard, node) of every task of a test, in the order in which they were begun."""
        lines = Path(self.environment[STARTS]).read_text(encoding="utf-8").splitlines()
        return [(shard, node) for shard, node in map(str.split, lines)]

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        """The `fp8moe` command with the small edition, on this machine."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.suite.small_edition", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: object) -> tuple[int, str]:
        return ended(self.begin(*arguments))

    def left_running(self, name: str | None = None) -> dict[int, str]:
        """Command lines, by process, of those that have the environment of these tests, or of a node in them."""
        marks = [f"{STARTS}={self.environment[STARTS]}\0".encode()]
        marks += [] if name is None else [f"{NODE}={name}\0".encode()]
        found = {}
        for path in PROC.glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes()
            except OSError:
                continue
            if all(mark in environment for mark in marks):
                found[int(path.parent.name)] = command(int(path.parent.name))[:80]
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes with a core each; after it no process that they started is left."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        address = f"{HERE}:{free.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("cluster")
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = os.pathsep.join(filter(None, sys.path))
    own = {"PYTHONPATH": path, STARTS: str(folder / "starts"), "RAY_USAGE_STATS_ENABLED": "0"}
    made = Nodes(folder, tempfile.mkdtemp(prefix="ray"), {**os.environ, **own, **secret}, address)
    try:
        yield made
    finally:
        for name in list(made.processes):
            made.kill(name)
        try:
            wait_until(lambda: not made.left_running(), lambda: f"left running: {made.left_running()}")
        finally:
            shutil.rmtree(made.short, ignore_errors=True)


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """Both of them, and no task begun."""
    cluster.start()
    Path(cluster.environment[STARTS]).write_text("")
    return cluster


def wait_until(condition: Callable[[], object], otherwise: Callable[[], str]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, otherwise()
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def statuses(folder: Path) -> dict[tuple[str, str], str]:
    evidence = json.loads(gzip.decompress((folder / EVIDENCE).read_bytes()))
    return {(check["check"], check["case"]): check["status"] for check in cases_of(evidence)}


def test_a_task_on_a_gpu_that_is_none(nodes: Nodes, tmp_path: Path) -> None:
    asked = (*ASKED, "--device", "cuda", "--out", tmp_path / "certificate", "--ray", nodes.address)
    status, told = nodes.run(*asked, "--ray-accelerator", "H200")
    assert (status, "accelerator H200: the cluster's GPUs are 1 of type H100" in told) == (64, True), told
    status, told = nodes.run(*asked)
    assert (status, "1 shard, on 1 GPUs of type H100" in told) == (64, True), told
    assert "--ray: shard 1/1: cuda: torch " in told
    assert nodes.starts() == [("1/1", "second")]


@pytest.mark.parametrize(("number", "status_then"), [(signal.SIGINT, 2), (signal.SIGTERM, 143)])
def test_what_was_run_before_an_interruption_is_not_run_again(
    number: signal.Signals, status_then: int, nodes: Nodes, tmp_path: Path
) -> None:
    out = tmp_path / "certificate"
    asked = (*ASKED, "--out", out, "--ray", nodes.address)
    running = nodes.begin(*asked, "--ray-shards", 4)
    wait_until(lambda: list(tmp_path.glob("certificate.shard-*.json.gz")), lambda: f"no end: {nodes.starts()}")
    running.send_signal(number)
    status, told = ended(running)
    assert (status, "interrupted: what has been run is kept" in told) == (status_then, True), told
    kept = sorted(path.name for path in tmp_path.glob("certificate.shard-*.json.gz"))
    assert 1 <= len(kept) < 4
    before = nodes.starts()

    status, told = nodes.run(*asked)
    assert (status, f"4 shards, {len(kept)} of them are kept from before" in told) == (0, True), told
    again = [shard for shard, _ in nodes.starts()[len(before) :]]
    done = {name.split("-")[1] for name in kept}
    assert sorted(again) == [*(f"{number}/4" for number in "1234" if number not in done), "whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["certificate"]


def test_the_shards_of_a_node_that_is_killed_run_again(nodes: Nodes, tmp_path: Path) -> None:
    out = tmp_path / "by-ray"
    running = nodes.begin(*ASKED, "--out", out, "--ray", nodes.address, "--ray-shards", 4)
    wait_until(lambda: "second" in [node for _, node in nodes.starts()], lambda: f"begun: {nodes.starts()}")
    nodes.kill("second")
    status, told = ended(running)
    assert (status, "4 shards, on 2 CPU cores" in told) == (0, True), told
    assert f"certificate of edition {SMALL.edition}" in told
    assert "; 4 of 4" in told

    begun = nodes.starts()
    assert [shard for shard, node in begun if node == "second"]
    assert sorted(shard for shard, node in begun if node == "first") == ["1/4", "2/4", "3/4", "4/4", "whole"]

    assert [path.name for path in tmp_path.iterdir()] == ["by-ray"]
    status, told = nodes.run("verify", out, "--spot-check", 2)
    assert (status, "holds: the backend passed" in told) == (0, True), told
    # Of those that it may draw one is not applicable.
    assert re.search("2 cases run again on this device: (2 with the same bits|1 with the same bits, 1 refused)", told)

    status, told = nodes.run(*ASKED, "--out", tmp_path / "alone")
    assert status == 0, told
    assert statuses(out) == statuses(tmp_path / "alone")
    planned = items_for(SMALL.level, {"block": ("silu",)}, target_of("cpu"), SMALL.seed, fnuz=True)
    assert sorted(statuses(out)) == sorted(item.key for item in planned)
