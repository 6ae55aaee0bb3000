"""`fp8moe measure`: times every backend that could be selected here, side by side; the regret, and a table of times."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.text import Text

from conformance import kept_text
from conformance.brief import brief
from conformance.cases import Case
from conformance.certificate.verifying import verify
from conformance.performs import Floor, floor_of
from conformance.pinned import checkpoint_cases
from conformance.plan import Target, resolve_target
from conformance.rates import rates_of
from conformance.report import Report
from conformance.timing.measured_rates import measured_rates
from conformance.timing.rows import SOURCE, VERSIONS, ranks, rows_of
from conformance.timing.side_by_side import Contenders, Regret, SideBySide, Standing, contenders, regret, side_by_side
from fp8moe.commands import tables
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted
from fp8moe.measured import MeasuredTable, policy_regret
from fp8moe.measured.here import installed_versions
from fp8moe.measured.rows import Certificate, MeasuredDevice

LARGEST_TOKENS = 1 << 14
"""Of all ranks together, as engines bound a step's tokens."""


@dataclass(frozen=True)
class Measured:
    """One case: who could be selected, and what each took.

    Args:
        floor: by the device's data sheet, which nothing can be faster than; None where there is none of it.
        reached: by what a copy and a GEMM reach here.
    """

    case: Case
    contenders: Contenders
    times: SideBySide
    regret: Regret | None
    floor: Floor | None
    reached: Floor

    @property
    def too_fast(self) -> list[str]:
        """Backends that took less time than the work needs: not all of it was done, or this is another device."""
        if self.floor is None:
            return []
        return [name for name in self.times.us if self.times.typical_us(name) < self.floor.us]


def measured(also: Sequence[str], budget: float | None, tokens: Sequence[int] = ()) -> tuple[list[Measured], int]:
    """Every published layer in the schemes of its checkpoints; and how many were left when the budget was spent.

    Args:
        also: backends that are in no order, timed beside the others.
        tokens: numbers of tokens for each layer, as the table counts them (`MeasuredRow`), as far as all ranks together
            have no more than `LARGEST_TOKENS`; none: those of the suite.

    Raises:
        BadInput: no CUDA device.
    """
    try:
        target = resolve_target("cuda")
    except ValueError:
        raise BadInput(f"fp8moe measure needs a CUDA device, and torch {torch.__version__} sees none here") from None
    cases = checkpoint_cases(target)
    if tokens:
        cases = list(dict.fromkeys(replace(case, tokens=number * ranks(case)) for case in cases for number in tokens))
        cases = [case for case in cases if case.tokens <= LARGEST_TOKENS]
    layers: dict[Case, list[Case]] = {}
    for case in cases:
        layers.setdefault(replace(case, tokens=1), []).append(case)
    found: list[Measured] = []
    started = time.monotonic()
    for of_layer in layers.values():
        standing: Standing | None = None
        for case in of_layer:
            spent = time.monotonic() - started
            if budget is not None and spent > budget:
                return found, len(cases) - len(found)
            print(f"{spent:.0f} s  {len(found) + 1}/{len(cases)} {case}", file=sys.stderr, flush=True)
            standing = standing or Standing.of(max(of_layer, key=lambda case: case.tokens))
            found.append(_one(case, target, also, standing))
    return found, 0


def _one(case: Case, target: Target, also: Sequence[str], standing: Standing) -> Measured:
    who = contenders(case, target)
    times = side_by_side(case, list(dict.fromkeys([*who.eligible, *also])), who.absent, standing=standing)
    rates = rates_of(torch.cuda.get_device_name(0))
    return Measured(
        case,
        who,
        times,
        regret(times, who.selected) if who.selected in times.us else None,
        None if rates is None else floor_of(times.work, rates, case.scheme),
        floor_of(times.work, measured_rates().rates, case.scheme),
    )


def print_measured(found: Sequence[Measured], left: int) -> bool:
    """A row for each case: each backend's time and the part of it that the device needs, its memory, the fastest, what
    the selected one costs over it. Returns whether nothing was faster than the device."""
    names = list(dict.fromkeys(name for one in found for name in one.times.us))
    out = tables.console(width=180 + 40 * len(names))
    columns = [column for name in names for column in (name, "MiB")]
    title = "side by side: microseconds a call (share of the measured floor), peak MiB of a layer's own memory"
    table = tables.table(title, "case", "floor", *columns, "selected", "best", "regret", "in")
    for one in found:
        cells = [cell for name in names for cell in _cells(one, name)]
        of = one.regret
        told = ("-", "-", "-") if of is None else (of.best, f"{of.value:.1%}", f"{of.low:.1%} to {of.high:.1%}")
        floor = f"{one.reached.us:.1f}, {one.reached.by}"
        table.add_row(str(one.case), floor, *cells, one.contenders.selected or "-", *told)
    out.print(table)
    for line in summary(found):
        out.print(Text(line), soft_wrap=True)
    if found:
        out.print(Text(f"floor: {measured_rates().told}"), soft_wrap=True)
    if left:
        out.print(Text(f"not run: {counted(left, 'case')}, since the budget was spent", style="yellow"))
    wrong = [(name, one) for one in found for name in one.too_fast]
    for name, one in wrong:
        assert one.floor is not None
        took, need = one.times.typical_us(name), one.floor
        line = f"{name} took {took:.1f} us, less than the {need.us:.1f} us that its {need.by} need by the data sheet"
        out.print(Text(f"{line}: {one.case}", style="bold red"), soft_wrap=True)
    return not wrong


def _cells(one: Measured, name: str) -> tuple[str, str]:
    if name not in one.times.us:
        return "-", "-"
    us = one.times.typical_us(name)
    return f"{us:.1f} ({one.reached.us / us:.0%})", f"{one.times.memory[name].peak / (1 << 20):.1f}"


def summary(found: Sequence[Measured]) -> Iterator[str]:
    """The regret of the seed's order over the cases where there was a choice, and who was not there."""
    judged = [one.regret.value for one in found if one.regret is not None and len(one.times.us) > 1]
    if judged:
        ordered = sorted(judged)
        p95 = ordered[min(round(0.95 * len(ordered)), len(ordered) - 1)]
        middle = ordered[len(ordered) // 2]
        yield (
            f"regret of the seed's order over {counted(len(judged), 'case')}: median {middle:.1%}, p95 {p95:.1%}, "
            f"worst {ordered[-1]:.1%}"
        )
    alone = sum(len(one.times.us) == 1 for one in found)
    if alone:
        yield f"no regret in {counted(alone, 'case')}: one backend alone can run there"
    absent: dict[tuple[str, str], int] = {}
    for one in found:
        for name, why in one.times.absent.items():
            absent[name, why] = absent.get((name, why), 0) + 1
    for (name, why), count in absent.items():
        yield f"absent: {name}, in {counted(count, 'case')}: {why}"


def policy_lines(table: MeasuredTable) -> Iterator[str]:
    """The regret of the measured policy at each of the table's points, without the times at that number of tokens, and
    of the seed's order beside it; nothing where no backend is certified."""
    if not table.certificates:
        return
    found = policy_regret(table, platform=resolve_target("cuda").platform, device=table.device.name)
    if not found.judged():
        yield "measured policy: no point where what it picks and what the seed's order picks both have a time"
        return
    yield f"measured policy, each point left out of the table: {found.policy()} points; by measurement alone: " + str(
        found.policy(measured_only=True)
    )
    yield f"the seed's order at the same points: {found.seed()}; where measurement decides: " + str(
        found.seed(measured_only=True)
    )
    if found.unjudged:
        yield f"not judged: {len(found.unjudged)} points, where no eligible backend has a time"


def tokens_of(text: str | None) -> tuple[int, ...]:
    """Of "1,16,256"; none where nothing was given.

    Raises:
        BadInput: something else than positive integers with commas between them.
    """
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise BadInput(f"--tokens {text}: expected positive integers with commas between them, such as 1,16,256")
    return found


def check_output(out: Path | None, reports: Sequence[Path]) -> None:
    """Before anything is timed.

    Raises:
        BadInput: a certificate without a table to go into; a folder that is not there.
    """
    if reports and out is None:
        raise BadInput("--certificate goes into the table of --out: give that too")
    if out is not None and (not out.absolute().parent.is_dir() or out.is_dir()):
        raise BadInput(f"--out {out}: expected a file in a folder that exists")


def certificates_of(reports: Sequence[Path]) -> dict[str, Certificate]:
    """Of reports of `fp8moe check --level certify --report`, and of certificates: their backends may be picked by
    measurement.

    Raises:
        BadInput: a report or certificate that is none, did not pass, or is of another device or other versions.
    """
    found = {}
    for path in reports:
        try:
            name, certificate = Certificate.of_report(_derived(path), _device(), installed_versions(*VERSIONS))
        except (OSError, ValueError) as error:
            raise BadInput(f"--certificate {path}: {error}") from None
        found[name] = certificate
    return found


def _derived(path: Path) -> bytes:
    """A report, whose verdict follows from its checks, or that of a certificate that holds.

    Raises:
        OSError: as reading raises it.
        ValueError: it is neither, or claims another verdict.
    """
    if path.is_dir():
        verified = verify(path)
        if verified.findings or verified.certificate is None:
            raise ValueError(f"it does not hold: {brief(verified.findings[0])}; see fp8moe verify {path}")
        return verified.certificate.report.to_json().encode()
    content = kept_text.read_bytes(path)
    verdict, claimed = Report.from_json(content).verdict, json.loads(content).get("verdict")
    if verdict != claimed:
        raise ValueError(f"report.verdict={claimed!r}: its checks come to {verdict!r}; make the report again")
    return content


def _device() -> MeasuredDevice:
    try:
        platform = resolve_target("cuda").platform
    except ValueError:
        raise BadInput(f"fp8moe measure needs a CUDA device, and torch {torch.__version__} sees none here") from None
    return MeasuredDevice(torch.cuda.get_device_name(0), platform.kind, platform.architecture)


def table_of(found: Sequence[Measured], certificates: Mapping[str, Certificate]) -> MeasuredTable:
    """The times as `fp8moe explain --measured` takes them."""
    rows = rows_of((one.case, {name: one.times.typical_us(name) for name in one.times.us}) for one in found)
    return MeasuredTable(_device(), installed_versions(*VERSIONS), rows, certificates, SOURCE)
