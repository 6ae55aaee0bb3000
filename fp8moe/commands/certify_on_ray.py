"""`fp8moe certify BACKEND --ray ADDRESS`: the shards of `--shard K/N` as tasks of a Ray cluster."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from conformance import kept_text
from conformance.certificate.times.kept import NOT_TAKEN, Times
from conformance.editions import DEVICES
from conformance.on_ray import WHOLE, Asked, Cluster, ClusterError, Ended, Placement, TaskLost, connected, placement_on
from conformance.report import Report
from conformance.shards import MOST, InvalidShard, Shard, left_over, of_one_run
from fp8moe.commands import tables
from fp8moe.commands.certify import OF_A_RUN, edition_for, end, of_shards, partial, piece_of
from fp8moe.commands.check import print_report, tell_hanging, write_report
from fp8moe.commands.files import NotWritten
from fp8moe.commands.progress import duration, time_left
from fp8moe.commands.question import BadInput
from fp8moe.commands.waivers import read
from fp8moe.counted import counted

ON_A_CLUSTER = "the shards were run on a cluster; times are of one device, with nothing else on it"


def certify_on_ray(
    backend: str,
    out: Path,
    name: str | None,
    device: str | None,
    key: Path | None,
    waivers: Path | None,
    address: str,
    count: int | None,
    accelerator: str | None,
    seconds: float | None = None,
) -> Report | None:
    """As `certify`, on every node of a cluster. What has been run when it is interrupted is kept beside `out`, and the
    next call runs the rest.

    Args:
        address: of the cluster, as `ray.init` takes it.
        count: of shards; None: as many as there are places, or as those that are kept.
        accelerator: Ray's name of the type of GPU; None: the one that there is.
        seconds: of one case; None: the plain limits.

    Returns:
        the report; None where it was interrupted, a node was lost too often, or a shard did not come to its end.

    Raises:
        BadInput: as `certify`; no cluster, or none that can run this.
        NotWritten: as `certify`, or a shard could not be kept; the others are.
        conformance.contain.SuiteError: an exception of the suite's own in a task.
    """
    which = edition_for(name, device, out, key)
    if waivers is not None:
        read("--waivers", waivers)
    text = None if waivers is None else waivers.read_text(encoding="utf-8")
    asked = Asked(backend, which.level, which.seed, device, text, seconds)
    told = tables.console(stderr=True)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    kept = partial(out)
    pieces: list[Path] = []
    found = {} if kept.exists() else _shards_beside(out, asked)
    count = _count(count, found)
    try:
        with connected(address) as cluster:
            placement = placement_on(cluster.nodes, device, accelerator)
            if kept.exists():
                told.print(f"goes on with {escape(str(kept))}")
                before = kept_text.read_text(kept)
            else:
                every = _every(count or min(placement.places, MOST))
                pieces = [piece_of(out, shard) for shard in every]
                if not _run(cluster, asked, out, every, found, placement, told):
                    return None
                before = of_shards(pieces).to_json()
            told.print("now what is of the whole run")
            whole = cluster.run_one(asked, WHOLE, before, placement)
    except TaskLost as lost:
        told.print(f"{lost}: what has been run is kept; the same command runs the rest", markup=False, soft_wrap=True)
        return None
    except ClusterError as error:
        raise BadInput(f"--ray: {error}") from None
    except KeyboardInterrupt:
        told.print("interrupted: what has been run is kept; the same command runs the rest")
        return None
    report = Report.from_json(whole.report)
    unwritten = None
    try:
        write_report(kept, report)
    except NotWritten as error:
        unwritten = error
    print_report(report)
    tell_hanging(report, "give it a greater --seconds; the same command goes on with it")
    times = Times(NOT_TAKEN, ON_A_CLUSTER)
    end(report, which, out, lambda: json.loads(whole.surroundings), key, lambda: times, unwritten)
    if not kept.exists():
        for piece in pieces:
            piece.unlink()
    return report


def _shards_beside(out: Path, asked: Asked) -> dict[Shard, Report]:
    """Those that an earlier call has kept, by hand or on a cluster.

    Raises:
        BadInput: one cannot be read, or is of another run.
    """
    pattern = re.compile(re.escape(out.name) + r"\.shard-([0-9]+)-of-([0-9]+)\.json\.gz")
    found: dict[Shard, Report] = {}
    for path in sorted(out.absolute().parent.iterdir()):
        name = pattern.fullmatch(path.name)
        if name is None:
            continue
        try:
            shard = Shard.parse(f"{name[1]}/{name[2]}")
            report = Report.from_json(kept_text.read_text(path))
            given = {"origin": asked.origin, "level": asked.level, "seed": asked.seed, "shard": str(shard)}
            for field, value in given.items():
                if getattr(report, field) != value:
                    raise InvalidShard(f"{field}={getattr(report, field)!r}: expected {value!r}")
            found[shard] = report
            of_one_run(list(found.values()))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: {error}; move it away, or name another folder") from None
    return found


def _count(count: int | None, found: Mapping[Shard, Report]) -> int | None:
    """How many shards; None where the cluster decides.

    Raises:
        BadInput: other than those that are kept, which are of several counts, or more than there may be.
    """
    counts = {shard.count for shard in found}
    if len(counts) > 1 or (counts and count not in (None, *counts)):
        there = ", ".join(f"of {each}" for each in sorted(counts))
        raise BadInput(f"--ray-shards {count or '(none)'}: beside the folder are shards {there}; move them away")
    if count is not None and not 1 <= count <= MOST:
        raise BadInput(f"--ray-shards {count}: expected 1 to {MOST}")
    return next(iter(counts), count)


def _every(count: int) -> list[Shard]:
    return [Shard(number, count) for number in range(1, count + 1)]


def _run(
    cluster: Cluster,
    asked: Asked,
    out: Path,
    every: list[Shard],
    found: Mapping[Shard, Report],
    placement: Placement,
    told: Console,
) -> bool:
    """Runs the shards that are missing; whether all have come to their end."""
    to_run = [shard for shard in every if shard not in found or left_over(found[shard])]
    there = f"{len(every) - len(to_run)} of them are kept from before, " if found else ""
    told.print(f"{counted(len(every), 'shard')}, {there}on {placement.places} {placement.kind}", markup=False)
    before = {str(shard): found[shard].to_json() if shard in found else "" for shard in to_run}
    begun = time.monotonic()
    took: list[float] = []
    left: list[str] = []
    for ended in cluster.run(asked, before, placement):
        report = Report.from_json(ended.report)
        if report.target not in DEVICES:
            raise BadInput(f"--device {report.target}: {OF_A_RUN}")
        write_report(piece_of(out, Shard.parse(ended.shard)), report)
        took.append(ended.seconds)
        left += [f"shard {ended.shard}: {each.reason}" for each in left_over(report)[:1]]
        line = f"{_line(ended, report)}; {len(took)} of {len(to_run)}"
        if len(took) < len(to_run):
            whole = ceil(len(to_run) / max(placement.places, 1)) * sum(took) / len(took)
            line += f", {time_left(max(whole - (time.monotonic() - begun), 0.0))}"
        told.print(line, markup=False, soft_wrap=True)
    for line in left:
        told.print(f"not at its end: {line}; the same command goes on with it", markup=False, soft_wrap=True)
    return not left


def _line(ended: Ended, report: Report) -> str:
    checks = sum(bool(check.case) for check in report.checks)
    failed = f", {len(report.failures)} FAILED" if report.failures else ""
    return f"shard {ended.shard}: {counted(checks, 'check')} in {duration(ended.seconds)} on {ended.node}{failed}"
