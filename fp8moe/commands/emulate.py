"""`fp8moe emulate`: one case in the arithmetic of devices that are not here, and how far apart their results lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from conformance.cases import Case, InvalidCase
from conformance.emulated import DEVICES, TABLE_LEGEND, Emulation, check_device, emulate, looser_bounds, table
from conformance.results import CheckResult, Evidence, Status, finite
from fp8moe.commands import tables
from fp8moe.commands.question import BadInput, pick

DEFAULT_CASE = "v1:M=17,values=same_sign"
"""Block scales; and values of one sign, where accumulators differ most."""


def emulation_of(case: str, devices: Sequence[str]) -> tuple[Emulation, list[CheckResult]]:
    """The case on the devices named, all if none is, and the verdict on each: the bound of its own arithmetic.

    Raises:
        BadInput: no such case or device, or a case that our FP8 kernels do not take.
    """
    catalogue = {device.stands_for: name for name, device in DEVICES.items() if device.stands_for}
    picked = [pick("--device", name, (*DEVICES, *catalogue)) for name in devices]
    try:
        emulation = emulate(Case.parse(case), [catalogue.get(name, name) for name in picked] or DEVICES)
    except InvalidCase as error:
        raise BadInput(str(error)) from None
    return emulation, [check_device(emulation, name) for name in emulation.replays]


def failures(emulation: Emulation, results: Sequence[CheckResult]) -> list[str]:
    """What does not hold, in words: an output outside its bound, or bounds that do not follow the units' order."""
    return [f"{result.backend}: {result.reason}" for result in results if result.reason] + looser_bounds(emulation)


def emulation_json(emulation: Emulation, results: Sequence[CheckResult]) -> dict[str, Any]:
    """The devices, their verdicts, the distances."""
    devices = [
        {
            "device": name,
            "stands_for": DEVICES[name].stands_for,
            "basis": DEVICES[name].basis,
            "arithmetic": asdict(emulation.arithmetic(name)),
            "status": result.status.value,
            "reason": result.reason,
            "error_over_bound": finite(result.statistics),
        }
        for name, result in zip(emulation.replays, results, strict=True)
    ]
    return {
        "format": tables.FORMAT,
        "case": str(emulation.case),
        "tile": emulation.tile,
        "evidence": Evidence.SIMULATED.value,
        "devices": devices,
        "distances": [{"devices": pair, **found.to_json()} for pair, found in emulation.distances.items()],
        "failures": failures(emulation, results),
    }


def print_emulation(emulation: Emulation, results: Sequence[CheckResult]) -> None:
    out = tables.console()
    out.print(f"{emulation.case}", soft_wrap=True)
    out.print(table(emulation))
    out.print(TABLE_LEGEND, soft_wrap=True)
    devices = tables.table(
        "devices; error/bound of the output and of the first GEMM, limit 1",
        "device", "stands for", "unit", "output", "first GEMM", "detail",
    )  # fmt: skip
    for result, name in zip(results, emulation.replays, strict=True):
        device, style = DEVICES[name], "red" if result.status is Status.FAILED else ""
        devices.add_row(
            name,
            device.stands_for,
            emulation.arithmetic(name).unit,
            Text(f"{result.error_over_bound:.2f}", style=style),
            Text(f"{result.statistics['first_gemm']:.2f}", style=style),
            Text(device.basis),
        )
    out.print(devices)
    for text in failures(emulation, results):
        out.print(f"FAILED {text}", style="red", soft_wrap=True, markup=False)
    out.print("evidence: simulated, replayed on the CPU; none of these devices was used")
