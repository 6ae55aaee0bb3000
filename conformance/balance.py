"""`python -m conformance.balance REPORT ...`: how evenly shards would divide a run, by the durations in its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.cases import Case
from conformance.certificate.reading import read_certificate
from conformance.kept_text import read_text
from conformance.levels import Item
from conformance.report import Report
from conformance.shards import dealt
from fp8moe.counted import counted

COUNTS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Balance:
    """
    Args:
        checks: those of the report that have a duration.
        seconds: how long each shard's checks took, one after the other.
    """

    checks: int
    seconds: Sequence[float]

    @property
    def efficiency(self) -> float:
        """All durations over those of as many shards as long as the longest: 1 where none waits for another."""
        return sum(self.seconds) / (len(self.seconds) * max(self.seconds))


def balance_of(report: Report, count: int) -> Balance:
    """As the shards of this run would have been, on as many equal devices. What each of them does once, starting its
    processes and compiling kernels, is in no duration but of the case that waited for it.

    Raises:
        ValueError: no durations, as in reports of before 2026-11-29.
    """
    checks = [check for check in report.checks if check.case]
    took = {(check.check, check.case): check.seconds for check in checks if check.seconds is not None}
    if not took:
        raise ValueError("no check of this report has a duration: reports of before 2026-11-29 have none")
    items = [Item(check, Case.parse(case), "") for check, case in took]
    return Balance(len(took), [sum(took[item.key] for item in piece) for piece in dealt(items, count)])


def read_report(path: Path) -> Report:
    """Of a run of a level: a file, .gz or not, or the one in a certificate's folder.

    Raises:
        OSError: as reading raises it.
        ValueError: it is neither.
    """
    return read_certificate(path).report if path.is_dir() else Report.from_json(read_text(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m conformance.balance", description=__doc__)
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="of a run of a level, or a certificate",
    )
    for path in parser.parse_args(arguments).reports:
        try:
            report = read_report(path)
            found = {count: balance_of(report, count) for count in COUNTS}
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        whole = found[COUNTS[0]]
        took = f"{counted(whole.checks, 'check')}, {sum(whole.seconds):.0f} s"
        print(f"{report.backend} at {report.level} on {report.device}: {took}")
        for count, each in found.items():
            print(f"  {count:2} shards: the longest {max(each.seconds):.1f} s, efficiency {each.efficiency:.1%}")


if __name__ == "__main__":
    main()
