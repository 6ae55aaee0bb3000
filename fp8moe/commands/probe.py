"""`fp8moe probe`: which arithmetic a backend, or the device's own FP8 product, has, told by crafted dot products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.text import Text

from conformance.not_here import NoDevice
from conformance.plan import Target, load_subject, resolve_target
from conformance.probe.backend import Probed, Reading, Verdict, probed, reading
from conformance.probe.device import device_dots
from conformance.probe.fingerprint import Fingerprint, Unreadable, fingerprint
from conformance.probe.known import Match
from conformance.probe.selftest import Identified, identify_units
from conformance.results import Evidence, Status, place
from fp8moe.commands import tables
from fp8moe.commands.question import BadInput
from fp8moe.platforms import detected_platform
from fp8moe.recipe import Arithmetic
from fp8moe.registry import BackendContractError

OURS = "TRITON"
STATUSES = {Status.PASSED: 0, Status.FAILED: 1}
"""The exit status by that of the check; 2 for all others, of which nothing is known."""
NOT_KNOWN = 2
COLUMNS = ("F", "group", "cut", "K order", "prefix", "carried", "rounded", "promoted")
LEGEND = (
    "F: bits kept below the largest exponent of a group; cut: how its terms are; prefix: whether the running sum is "
    "one of them; carried, rounded: bits of the running sum, and how it is rounded to them; ?: could not be told"
)
STYLES = {Verdict.WORSE: "red", Verdict.BETTER: "yellow", Verdict.NOT_DECLARED: "yellow", Verdict.UNREADABLE: "red"}


@dataclass(frozen=True)
class Found:
    """One thing that was probed, or could not be.

    Args:
        name: a backend, or a function of torch.
        target: where.
        status: of the check; a product of torch declares nothing, so it passes once it is read.
        reason: why, for every status but passed, and for verdicts other than as declared.
        evidence: its class; "" where nothing was run.
    """

    name: str
    target: str
    status: Status
    reason: str
    evidence: str = ""
    readings: tuple[Reading, ...] = ()

    @property
    def exit_status(self) -> int:
        return STATUSES.get(self.status, NOT_KNOWN)


def probe_named(backend: str, device: str | None) -> Found:
    """One backend, by name or module:Class.

    Raises:
        BadInput: no such backend or device.
    """
    try:
        target = resolve_target(device or "auto")
    except NoDevice as error:
        raise BadInput(f"--device {error}") from None
    try:
        subject = load_subject(backend)
    except (ValueError, BackendContractError) as error:
        raise BadInput(str(error)) from None
    return _of_backend(probed(subject, target), target)


def probe_here(device: str | None) -> list[Found]:
    """The device's own FP8 products, and our Triton kernels; what of it cannot be run says why.

    Raises:
        BadInput: the device is not there, or none that has arithmetic of its own.
    """
    if device in ("cpu", "interpreter"):
        raise BadInput(f"--device {device} has no FP8 matrix unit: name a backend to probe there, such as TorchExperts")
    here = detected_platform()
    kind = here.kind if device in (None, "auto") else device
    if kind not in ("cuda", "rocm", "xpu"):
        reason = f"torch {torch.__version__} sees no GPU here"
        other = f"{reason}; `fp8moe probe {OURS} --device interpreter` simulates it"
        return [
            Found("torch._scaled_mm", here.kind, Status.NOT_RUN, reason),
            Found(OURS, here.kind, Status.NOT_RUN, other),
        ]
    try:
        target = resolve_target(kind)
    except NoDevice as error:
        raise BadInput(f"--device {error}") from None
    dots = device_dots(target.platform, target.device)
    missing = f"no FP8 product in torch {torch.__version__} on {target.platform.architecture}"
    found = [_of_product(name, target) for name in dots]
    found = found or [Found("torch._scaled_mm", target.name, Status.NOT_RUN, missing)]
    return [*found, _of_backend(probed(load_subject(OURS), target), target)]


def _of_backend(result: Probed, target: Target) -> Found:
    check = result.result
    evidence = "" if check.evidence is None else check.evidence.value
    return Found(check.backend, target.name, check.status, check.reason, evidence, result.readings)


def _of_product(name: str, target: Target) -> Found:
    dtype = torch.float8_e4m3fnuz if target.platform.uses_fnuz else torch.float8_e4m3fn
    try:
        seen = fingerprint(device_dots(target.platform, target.device)[name], dtype=dtype)
    except (RuntimeError, Unreadable) as error:
        return Found(name, target.name, Status.NOT_RUN, str(error).partition("\n")[0])
    told = reading(seen, None, "scale 1", 0, target, dtype)
    return Found(name, target.name, Status.PASSED, told.detail, Evidence.HARDWARE.value, (told,))


def exit_status(found: Sequence[Found]) -> int:
    """1 where something is worse than declared; else 0 where something was read; else 2."""
    statuses = {one.exit_status for one in found}
    return next((status for status in (1, 0) if status in statuses), NOT_KNOWN)


# -- JSON --


def found_json(found: Found) -> dict[str, Any]:
    return {
        "format": tables.FORMAT,
        "name": found.name,
        "device": found.target,
        "status": found.status.value,
        "reason": found.reason,
        "evidence": found.evidence or None,
        "readings": [_reading_json(one) for one in found.readings],
    }


def _reading_json(one: Reading) -> dict[str, Any]:
    return {
        "scheme": one.scheme,
        "tokens": one.tokens,
        "verdict": one.verdict.value,
        "detail": one.detail,
        "fingerprint": asdict(one.seen),
        "declared": None if one.declared is None else asdict(one.declared),
        "looks_like": [_match_json(match) for match in one.looks_like],
    }


def _match_json(match: Match) -> dict[str, Any]:
    return {"units": match.units, "arithmetic": asdict(match.arithmetic), "differing": match.differing}


def units_json(rows: Sequence[Identified]) -> dict[str, Any]:
    return {
        "format": tables.FORMAT,
        "evidence": Evidence.SIMULATED.value,
        "units": [
            {
                "arithmetic": asdict(row.given),
                "fingerprint": asdict(row.seen),
                "looks_like": [_match_json(match) for match in row.looks_like],
                "right": row.right,
            }
            for row in rows
        ],
    }


# -- tables --


def print_found(found: Sequence[Found]) -> None:
    out = tables.console()
    for one in found:
        where = place(one.target, [Evidence(one.evidence) if one.evidence else None])
        out.print(f"{one.name} on {where}: {one.status.value}", soft_wrap=True, markup=False)
        if one.readings:
            made = tables.table("", "scheme", "tokens", *COLUMNS, "looks like", "declared", "verdict")
            for told in one.readings:
                made.add_row(
                    told.scheme,
                    str(told.tokens or "-"),
                    *_cells(told.seen),
                    Text("\n".join(map(str, told.looks_like)).replace(" = ", "\n= ") or "-"),
                    _declared(told.declared),
                    Text(told.verdict.value, style=STYLES.get(told.verdict, "green")),
                )
            out.print(made)
            out.print(LEGEND, soft_wrap=True)
        for text in _texts(one):
            out.print(text, style="red" if one.status is Status.FAILED else "", soft_wrap=True, markup=False)
        if one.evidence:
            out.print(f"evidence: {one.evidence}")


def _texts(one: Found) -> list[str]:
    """What there is to say, a reading a line; the reason as well, where it is more than the readings' own."""
    details = [str(told) for told in one.readings if told.detail]
    if any(one.reason.startswith(text) for text in details):
        return details
    return [*(text for text in details if text not in one.reason), *filter(None, (one.reason,))]


def print_units(rows: Sequence[Identified]) -> None:
    out = tables.console()
    made = tables.table("what the probe says of every unit, emulated", "given", "promoted", *COLUMNS, "right")
    for (units, declared), alike in _together(rows).items():
        right = all(row.right for row in alike)
        told = "yes" if right else f"NO: looks like {' or '.join(map(str, alike[0].looks_like)) or 'nothing known'}"
        promoted = declared.partition(" ")[2]
        made.add_row(units, promoted, *_cells(alike[0].seen), tables.yes_or_no(right, told, told))
    out.print(made)
    out.print(LEGEND, soft_wrap=True)
    out.print("evidence: simulated, replayed on the CPU; units in one row have the same arithmetic")


def _together(rows: Sequence[Identified]) -> dict[tuple[str, str], list[Identified]]:
    """The rows by the names of units with one arithmetic and what was given; those that were misread by themselves."""
    found: dict[tuple[str, str], list[Identified]] = {}
    for row in rows:
        names = row.looks_like[0].units if row.right else (row.given.unit,)
        given = _declared(row.given).partition(" ")[2]
        found.setdefault(("\n".join(names), f"{names[0]} {given}"), []).append(row)
    return found


def _cells(seen: Fingerprint) -> list[str]:
    if seen.is_fp32:
        return ["none", "-", "-", "-", "-", str(seen.carried_bits), seen.result or "?", "-"]
    one_group = isinstance(seen.promote_every, int) and seen.promote_every <= (seen.group or 0)
    order = seen.k_order or ("-" if (seen.group or 0) >= 32 else None)
    prefix = {None: "-" if one_group else None, True: "in group", False: "apart"}[seen.prefix_in_group]
    before = (seen.fraction_bits, seen.group, seen.terms, order, prefix)
    after = (seen.carried_bits, seen.result, seen.promote_every)
    return ["?" if value is None else str(value) for value in (*before, *after)]


def _declared(given: Arithmetic | None) -> str:
    if given is None:
        return "-"
    order = "" if given.k_order == "natural" else f", {given.k_order}"
    promoted = "never promoted" if given.promote_every is None else f"every {given.promote_every}"
    return f"{given.unit} {promoted}{order}"


def units() -> list[Identified]:
    """The self-test's rows."""
    return identify_units()
