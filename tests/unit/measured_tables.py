"""Tables of times for tests: those carried over for two devices, and the certificates that tests give themselves.

No backend here was judged: a certificate below is a test's own, so that there is something to pick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fp8moe import PLATFORMS
from fp8moe.measured import Certificate, LayerShape, MeasuredDevice, MeasuredRow, MeasuredTable

CARRIED_OVER: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "measured_hopper.json").read_text())
"""Times of vLLM 0.25.1's expert classes; the file has the source."""
DEVICES = {
    "h100": MeasuredDevice("H100 80GB HBM3", "cuda", "sm90"),
    "h200": MeasuredDevice("H200", "cuda", "sm90"),
}
WITHOUT_FLASHINFER = PLATFORMS["h100"].with_libraries("deep_gemm", "vllm")
"""A Hopper device with the libraries whose backends were measured."""
PASSED = Certificate("certify", "2026-11-24", "0" * 64)
LAYER = LayerShape(64, 4, 2048, 1024, "block")
"""The shape of `conformance.selection.build.make_config`'s layer."""
MEASURED = ("TRITON", "DEEPGEMM", "MARLIN", "VLLM_CUTLASS")


def rows_of(shape: LayerShape, times: Mapping[str, Mapping[int, float]]) -> list[MeasuredRow]:
    """Rows from {backend: {tokens: microseconds}}."""
    return [MeasuredRow(shape, tokens, name, us) for name, column in times.items() for tokens, us in column.items()]


def table_of(
    rows: Iterable[MeasuredRow],
    certified: Iterable[str] = MEASURED,
    device: MeasuredDevice = DEVICES["h100"],
    **certificates: Certificate,
) -> MeasuredTable:
    """A table whose backends of `certified` have a test's certificate."""
    given = dict.fromkeys(certified, PASSED) | certificates
    return MeasuredTable(device, {"fp8moe": "0.1.0"}, tuple(rows), given, "made by a test")


def carried_over(device: str, certified: Iterable[str] = MEASURED) -> MeasuredTable:
    """The table of one of `DEVICES`."""
    rows: list[MeasuredRow] = []
    for block in CARRIED_OVER["devices"][device]:
        sizes = {name: block[name] for name in ("experts", "top_k", "hidden", "intermediate", "scheme")}
        for name, column in block["us"].items():
            measured = {tokens: us for tokens, us in zip(block["tokens"], column, strict=True) if us is not None}
            rows += rows_of(LayerShape(**sizes), {name: measured})
    versions = {"fp8moe": "0.1.0", **CARRIED_OVER["versions"]}
    certificates = dict.fromkeys(certified, PASSED)
    return MeasuredTable(DEVICES[device], versions, rows, certificates, CARRIED_OVER["source"])


def log_time(points: dict[int, float], tokens: int) -> float | None:
    """The documented interpolation, the plain way."""
    if tokens in points:
        return math.log(points[tokens])
    below, above = [t for t in points if t < tokens], [t for t in points if t > tokens]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    part = (math.log(tokens) - math.log(low)) / (math.log(high) - math.log(low))
    return math.log(points[low]) + part * (math.log(points[high]) - math.log(points[low]))
