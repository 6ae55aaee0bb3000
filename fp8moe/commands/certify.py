"""`fp8moe certify BACKEND` and `fp8moe verify FOLDER`: a certificate that can be published, and whether one holds."""

from __future__ import annotations

import os
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text

from conformance.certificate.sampling import spot_check
from conformance.certificate.signing import CannotSign, private_key
from conformance.certificate.surroundings import brought_by, surroundings
from conformance.certificate.times.judged import TARGETS, summary
from conformance.certificate.times.kept import FAILED, TAKEN, Times
from conformance.certificate.times.taking import ASKED_S, take
from conformance.certificate.verifying import NOT_PROVEN, PROVEN, Verified, verify
from conformance.certificate.writing import NoCertificate, write_certificate
from conformance.editions import DEVICES, Edition, UnknownEdition, edition, names
from conformance.planned import device_name
from conformance.report import INCOMPLETE, Report
from conformance.shards import InvalidShard, Shard, gathered, left_over
from conformance.waivers.release import release_here
from fp8moe.commands import tables
from fp8moe.commands.check import (
    STYLES,
    NotGoneOnWith,
    checked,
    print_report,
    read_report,
    status_of,
    tell_hanging,
    write_report,
)
from fp8moe.commands.files import NotWritten, check_folders
from fp8moe.commands.interrupts import held
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted
from fp8moe.texts import clipped, visible

OF_A_RUN = f"a certificate is of a run on {', '.join(DEVICES)}"
SHOWN, MOST_OF_A_LINE = 20, 1000
MOST_TIMES_S = 3600
PROVES = f"proven: {PROVEN}. Not proven: {NOT_PROVEN}"


def certify(
    backend: str,
    out: Path,
    name: str | None,
    device: str | None,
    budget: float | None,
    key: Path | None,
    waivers: Path | None = None,
    shard: str | None = None,
    shards: Sequence[Path] = (),
    times_s: float = ASKED_S,
    seconds: float | None = None,
) -> Report:
    """Runs the edition's level, and writes the certificate of a complete run. What a budget or an interruption left is
    kept beside `out`, and the next call goes on with it.

    Args:
        shard: "K/N": run this piece alone, whose report goes beside `out`.
        shards: the reports of all pieces; what is of the whole run is then run here.
        times_s: for the times beside other backends, taken when all else is done; 0: none.
        seconds: of one case; None: the plain limits.

    Raises:
        NotWritten: the run is not beside `out`, but where its text says, or there is no certificate of it.
        BadInput: an edition, device or backend that is not there; a folder that is; a key that cannot sign; shards that
            are none, or not all of one run.
    """
    if not times_s <= MOST_TIMES_S:
        raise BadInput(f"--times {times_s:g}: at most {MOST_TIMES_S} seconds, 0 for none")
    which = edition_for(name, device, out, key)
    piece = None if shard is None else _shard(shard)
    kept = partial(out) if piece is None else piece_of(out, piece)
    if shards and (piece is not None or kept.exists()):
        raise BadInput(f"--shards: all of a run, so without --shard, and not beside {kept}")
    make_folder_of(out)
    check_folders({"--out": kept})
    told = tables.console(stderr=True)
    if kept.exists():
        told.print(f"goes on with {escape(str(kept))}")
    before = of_shards(shards) if shards else kept_run(kept) if kept.exists() else None
    named = "--shards" if shards else str(kept)
    target = device_name(device)
    if target not in DEVICES:
        named = f"--device {target}" if device else "no GPU is here, and no --device given"
        raise BadInput(f"{named}: {OF_A_RUN}; --device cpu is here")
    asked = (backend, which.level, target, which.seed, budget, kept)
    with held() as interrupted:
        try:
            report = checked(*asked, before, seconds, waivers, piece, interrupted, named)
        except NotGoneOnWith as error:
            if shards:
                raise
            tell_moved_aside(kept, error.told)
            report = checked(*asked, None, seconds, waivers, piece, interrupted)
        unwritten = kept_and_told(kept, report)
    if piece is not None:
        if unwritten is not None:
            raise unwritten
        again = {"--device": device, "--edition": name, "--waivers": waivers, "--sign": key}
        merged = ["fp8moe", "certify", backend, "--out", str(out)]
        merged += [text for option, value in again.items() if value is not None for text in (option, str(value))]
        told.print(
            f"in {kept}; the same command goes on with it"
            if left_over(report)
            else f"in {kept}; merge all {piece.count} with: {shlex.join(merged)} --shards FILE ...",
            markup=False,
            soft_wrap=True,
        )
        return report

    def around() -> Mapping[str, Any]:
        return surroundings(report.origin, release_here(report))

    if interrupted.is_set() and is_whole(report):
        raise KeyboardInterrupt
    end(report, which, out, around, key, lambda: _times(report, times_s), unwritten)
    return report


def kept_and_told(path: Path, report: Report) -> NotWritten | None:
    """A run goes beside the folder, and is printed.

    Returns:
        Why it could not be written there.
    """
    unwritten = None
    try:
        write_report(path, report)
    except NotWritten as error:
        unwritten = error
    print_report(report)
    tell_hanging(report, "give it a greater --seconds; the same command goes on with it")
    return unwritten


def edition_for(name: str | None, device: str | None, out: Path, key: Path | None) -> Edition:
    """
    Raises:
        BadInput: an edition or device that is not there; a folder that is; a key that cannot sign.
    """
    try:
        which = edition(name or names()[-1])
    except UnknownEdition as error:
        raise BadInput(f"--edition: {error}") from None
    if device is not None and device not in DEVICES:
        raise BadInput(f"--device {device}: {OF_A_RUN}")
    if out.exists():
        raise BadInput(f"--out {out}: is there already; remove it, or give another --out")
    if key is not None:
        try:
            private_key(key)
        except CannotSign as error:
            raise BadInput(str(error)) from None
    return which


def end(
    report: Report,
    which: Edition,
    out: Path,
    around: Callable[[], Mapping[str, Any]],
    key: Path | None,
    times: Callable[[], Times],
    unwritten: NotWritten | None = None,
) -> None:
    """Writes the certificate of a whole run, if it is complete; else the run stays beside `out`.

    Args:
        around: what `surroundings` says where it was run.
        times: as the certificate has them.
        unwritten: where the run is not beside `out`.

    Raises:
        BadInput: no certificate can be made of it, or by this key.
        NotWritten: neither the certificate could be written, nor the run beside it.
    """
    kept = partial(out) if unwritten is None else unwritten.kept
    if not is_whole(report):
        if unwritten is not None:
            raise unwritten
        told = f"no certificate yet: what was run is in {kept}; the same command goes on with it"
        tables.console(stderr=True).print(told, markup=False, soft_wrap=True)
        return
    taken = times()
    try:
        write_certificate(out, report, which.edition, around(), key, taken)
    except (NoCertificate, CannotSign) as error:
        raise BadInput(f"{error}; what was run is kept in {kept}") from None
    except OSError as error:
        told = f"{out}: the certificate could not be written ({error.strerror or error})"
        raise unwritten or NotWritten(f"{told}; with what is in {kept} the same command makes it", kept) from None
    for path in {partial(out), kept or partial(out)}:
        path.unlink(missing_ok=True)
    tables.console().print(f"certificate of edition {which.edition}: {escape(str(out))}")


def _times(report: Report, seconds: float) -> Times:
    """As the certificate has them; told when they are there."""
    if seconds > 0 and report.target in TARGETS:
        tables.console(stderr=True).print(f"times beside the other backends: at most {seconds:g} s")
    try:
        times = take(report, seconds)
    except Exception as error:  # the checks have been run, and their certificate is made all the same
        traceback.print_exc()
        times = Times(FAILED, f"an error of the suite itself: {type(error).__name__}: {error}")
    style = "bold red" if times.status == FAILED else ""
    tables.console().print(Text("\n".join(summary(times, report)), style=style), soft_wrap=True)
    return times


def partial(out: Path) -> Path:
    """Where a run is kept that has not come to its end."""
    return out.with_name(f"{out.name}.partial.json.gz")


def piece_of(out: Path, shard: Shard) -> Path:
    """Where the report of a shard is kept."""
    return out.with_name(f"{out.name}.shard-{shard.number}-of-{shard.count}.json.gz")


def make_folder_of(out: Path) -> None:
    """
    Raises:
        BadInput: the one that the certificate is to be in cannot be made.
    """
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: its folder cannot be made ({error.strerror or error}); name another") from None


def kept_run(kept: Path) -> Report:
    """What there is to go on with beside the folder.

    Raises:
        BadInput: it cannot be read, or is none.
    """
    return read_report(str(kept), kept, "it is no run to go on with: move it away, and the same command starts afresh")


def tell_moved_aside(kept: Path, why: str) -> None:
    """
    Raises:
        BadInput: it cannot be moved.
    """
    text = f"does not go on with {kept}, which is moved to {_moved_aside(kept)}: {why}. Starts afresh"
    tables.console(stderr=True).print(text, markup=False, soft_wrap=True)


def _moved_aside(kept: Path) -> Path:
    """Where a run is moved to that is not gone on with; what was moved aside before stays.

    Raises:
        BadInput: it cannot be moved.
    """
    names = (f"{kept.name}.old{number or ''}" for number in count())
    free = next(path for path in map(kept.with_name, names) if not os.path.lexists(path))
    try:
        kept.rename(free)
    except OSError as error:
        raise BadInput(
            f"{kept}: it is of other code, and cannot be moved aside ({error.strerror}): remove it"
        ) from None
    return free


def is_whole(report: Report) -> bool:
    """Whether a certificate can be made of a run: one that failed, too, has to have come to its end."""
    return report.verdict != INCOMPLETE and all(check.case for check in left_over(report))


def status_of_certify(report: Report) -> int:
    """As of `check`; of a shard: 0 where it was run to its end and nothing failed."""
    if report.shard:
        return 1 if report.failures else 2 if left_over(report) else 0
    return status_of(report)


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except InvalidShard as error:
        raise BadInput(f"--shard {error}") from None


def of_shards(shards: Sequence[Path]) -> Report:
    """All shards of a run as one report to go on with.

    Raises:
        BadInput: one cannot be read, or they are not all of one run.
    """
    otherwise = "name what `--shard` wrote"
    reports = [read_report(f"--shards {path}", path, otherwise) for path in shards]
    try:
        return gathered(reports)
    except InvalidShard as error:
        raise BadInput(f"--shards: {error}") from None


def verified(folder: Path, key: Path | None, sample: int) -> Verified:
    """
    Args:
        sample: how many cases to run again, where the certificate holds so far.

    Raises:
        BadInput: no folder; a key that is none; a sample, where the backend or such a device is not here.
    """
    if not folder.is_dir():
        why = "it is a file; name the folder of a certificate" if folder.exists() else "no such folder"
        raise BadInput(f"{folder}: {why}")
    try:
        found = verify(folder, key)
    except CannotSign as error:
        raise BadInput(str(error)) from None
    if sample and found.certificate is not None and found.holds:
        try:
            sampled = spot_check(found.certificate, sample)
        except ValueError as error:
            raise BadInput(f"--spot-check: {error}") from None
        found.findings += sampled.findings
        told = f"{counted(sampled.cases, 'case')} run again on this device: {sampled.equal} with the same bits"
        told += f", {sampled.refused} refused again" * bool(sampled.refused)
        found.notes.append(f"{told}, {len(sampled.findings)} otherwise than told")
    return found


def print_verified(found: Verified) -> None:
    """What it is of; then what speaks against it, and what a reader should know; the verdict last. Its texts are
    nobody's: none reaches the terminal as more than a line that can be read."""
    out = tables.console()
    if found.certificate is not None:
        report = found.certificate.report
        named = report.backend if report.backend == report.origin else f"{report.backend} ({report.origin})"
        package = brought_by(found.certificate.surroundings)
        named += f" from {package}" * bool(package)
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(report.counts.items()))
        out.print(
            _line(f"{named}, edition {found.certificate.edition}, on {report.device}, {report.date}: {counts}"),
            markup=False,
            soft_wrap=True,
        )
    for text in found.findings[:SHOWN]:
        out.print(Text(f"AGAINST IT  {_line(text)}", style="bold red"), soft_wrap=True)
    if len(found.findings) > SHOWN:
        out.print(f"and {len(found.findings) - SHOWN} more")
    for text in found.notes:
        out.print(Text(f"note  {_line(text)}"), soft_wrap=True)
    if found.holds:
        out.print(PROVES, soft_wrap=True)
        if found.certificate is not None:
            report, times = found.certificate.report, found.certificate.times
            told = summary(times, report) if times.status == TAKEN else []
            covered = [f"covered: {each}" for each in report.coverage]
            out.print(Text("\n".join(map(_line, [*told, *covered, report.scope]))), soft_wrap=True)
        out.print(Text(f"holds: the backend {found.verdict}", style=STYLES[found.verdict]))
    else:
        out.print(Text(f"does not hold: {counted(len(found.findings), 'finding')}", style="bold red"))


def _line(text: str) -> str:
    return clipped(visible(text), MOST_OF_A_LINE)
