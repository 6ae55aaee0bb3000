"""What this device reaches in a large copy and a large GEMM: measured once and kept, the same for every later run.

A floor from these is what a kernel can hope for. It is no bound: reading alone may be faster than a copy, and a short
GEMM than one that runs at the power limit. For floors that nothing can be faster than there is `conformance.rates`.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median

import platformdirs

from conformance.rates import Rates
from conformance.timing.graphs import Call, Unrolled, replays
from conformance.timing.recorded import setting
from conformance.timing.state import Watch
from conformance.timing.yardsticks import copy_call, gemm_call

COPY_BYTES = 1 << 30
GEMM = 8192
CALLS, REPLAYS = 8, 9
FORMAT = 1


@dataclass(frozen=True)
class MeasuredRates:
    """One measurement.

    Args:
        setting: device, driver and versions; with another one of them it is measured anew.
        date: ISO 8601.
        copy: bytes a second, read and written together.
        fp8, sixteen_bit: dense multiplications and additions a second; both of bf16 where torch has no FP8 product.
    """

    setting: dict[str, str]
    date: str
    copy: float
    fp8: float
    sixteen_bit: float
    format: int = FORMAT

    @property
    def rates(self) -> Rates:
        """For floors."""
        return Rates(self.copy, self.fp8, self.sixteen_bit, self.told)

    @property
    def told(self) -> str:
        """In words."""
        return (
            f"measured on {self.date[:10]}: a copy of {COPY_BYTES >> 30} GiB at {self.copy / 1e12:.2f} TB/s, GEMMs of "
            f"{GEMM} x {GEMM} x {GEMM} at {self.fp8 / 1e12:.0f} (FP8) and {self.sixteen_bit / 1e12:.0f} (bf16) TFLOP/s"
        )


@cache
def measured_rates() -> MeasuredRates:
    """Of torch's current device: what was kept for it, or else measured now, in about a second, and kept."""
    here, path = setting(), kept_in()
    kept = _load(path)
    if kept is None or kept.setting != here:
        with Watch() as watch:
            begin = time.monotonic()
            kept = MeasuredRates(here, datetime.now(timezone.utc).isoformat(timespec="seconds"), *_measure())
            disturbed = watch.flags(begin, time.monotonic())
        if disturbed:  # throttled, or shared: good for now, and no measure for later
            return kept
        with suppress(OSError):  # then it is measured anew another time
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_text(json.dumps(asdict(kept), indent=1) + "\n", encoding="utf-8")
            part.replace(path)
    return kept


def kept_in() -> Path:
    """The file for the current device, in the user's cache; remove it to measure anew."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", setting()["device"])
    return platformdirs.user_cache_path("fp8moe") / f"rates-{name}.json"


def _load(path: Path) -> MeasuredRates | None:
    try:
        found = MeasuredRates(**json.loads(path.read_text(encoding="utf-8")))
        figures = (found.copy, found.fp8, found.sixteen_bit)
        whole = found.format == FORMAT and isinstance(found.date, str) and all(map(_is_rate, figures))
    except (OSError, ValueError, TypeError):
        return None
    return found if whole else None


def _is_rate(figure: object) -> bool:
    return isinstance(figure, float) and 0 < figure < math.inf


def _measure() -> tuple[float, float, float]:
    flops = 2 * GEMM**3
    fp8, sixteen_bit = (flops / _seconds(gemm_call(GEMM, GEMM, GEMM, "cuda", fp8=fp8)) for fp8 in (True, False))
    # Not in a graph: there a copy of 512 MiB or more goes to a copy engine, at 2.7 rather than 4.2 TB/s (H200).
    return 2 * COPY_BYTES / _seconds(copy_call(COPY_BYTES, "cuda"), capture=False), fp8, sixteen_bit


def _seconds(call: Call, capture: bool = True) -> float:
    """Of one call: the median over launches of several."""
    graph = Unrolled([call], CALLS, capture=capture)
    return median(replay.us for replay in replays([graph] * REPLAYS)) / CALLS / 1e6
