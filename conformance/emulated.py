"""GPUs that are not there: what our Triton recipe gives in their arithmetic, replayed on the CPU, and how far apart.

A device is a row of `DEVICES`: the arithmetic that our kernels use on it, at each tile height. Two devices that keep
their contracts still give different bits; `Distance` says how different, and a comparison between vendors cannot ask
for less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from conformance.bits import difference
from conformance.bounds import allowance_for, judge
from conformance.bounds.allowance import first_gemm_error, half_spacing
from conformance.cases import Case, InvalidCase
from conformance.oracles import oracles_of, tensors_of
from conformance.results import CheckResult, Evidence, Status, finite
from fp8moe.backends.triton_arithmetic import LARGE_TILE, PROMOTION, SMALL_TILE, arithmetic_by_tile, tile_height
from fp8moe.backends.triton_stages import FP8_SCHEMES, contract_on
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Arithmetic
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.replay import Replay
from fp8moe.schemes import SCHEMES

CHECK = "computes.emulated"
BOUNDS_CHECK = "computes.emulated_bounds"
BACKEND = "TRITON on "
"""Before a device's name: a row of its own in the ledger, of no cell of the matrix, since nothing ran on a device."""
EMULATED_SCHEMES = tuple(name for name, keys in SCHEMES.items() if keys in FP8_SCHEMES)
TITLE = "emulated: distance between devices' honest results"


@dataclass(frozen=True)
class EmulatedDevice:
    """A device and the arithmetic of our FP8 GEMM on it.

    Args:
        name: its key in `DEVICES`.
        stands_for: a device of the catalogue with this architecture; "" for none.
        by_tile: tile height to arithmetic.
        basis: what the arithmetic is known from.
    """

    name: str
    stands_for: str
    by_tile: Mapping[int, Arithmetic]
    basis: str


def _declared(name: str, stands_for: str, basis: str) -> EmulatedDevice:
    """With what our backend declares on a device of the catalogue."""
    by_tile = arithmetic_by_tile(PLATFORMS[stands_for], interpreted=False)
    assert by_tile is not None, stands_for
    return EmulatedDevice(name, stands_for, by_tile, basis)


def _at_every_height(arithmetic: Arithmetic) -> Mapping[int, Arithmetic]:
    return {SMALL_TILE: arithmetic, LARGE_TILE: arithmetic}


_MODELLED = "declared; the unit as MMA-Sim models it"
DEVICES: dict[str, EmulatedDevice] = {
    device.name: device
    for device in (
        _declared("sm_89", "l40s", _MODELLED),
        _declared("sm_90", "h100", "declared; the bits as measured on an H100"),
        _declared("sm_100", "b200", f"{_MODELLED}, a small tile's order of K as on Hopper"),
        _declared("sm_120", "rtx_pro_6000", _MODELLED),
        EmulatedDevice(
            "gfx942",
            "mi300x",
            _at_every_height(Arithmetic.on("cdna3.mfma_f16", promote_every=PROMOTION)),
            "assumed, neither declared nor measured: e4m3fn widened to fp16, v_mfma_f32 of fp16 as MMA-Sim models it, "
            f"promoted every {PROMOTION}, K in its natural order",
        ),
        EmulatedDevice(
            "fp32",
            "",
            _at_every_height(Arithmetic("fp32", promote_every=PROMOTION)),
            f"no device: sums in fp32, rounded to nearest, K in its natural order, promoted every {PROMOTION}",
        ),
    )
}


@dataclass(frozen=True)
class Distance:
    """Between two devices' outputs, of the judged tokens.

    Args:
        differing: elements that differ.
        elements: all of them.
        steps: the most numbers of the output's format between two elements, plus one. Beside a zero that is many.
        of_token: the largest |difference|, over the largest output of its token.
        of_bound: the largest |difference| over the sum of what the two may each be off: at most 1 if both are honest.
        first_gemm: share of the first GEMM's elements that differ, in fp32: the output's rounding hides most of it.
    """

    differing: int
    elements: int
    steps: int
    of_token: float
    of_bound: float
    first_gemm: float

    @property
    def share(self) -> float:
        return self.differing / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = finite(asdict(self))
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Distance:
        differing, elements, steps = (int(data[name]) for name in ("differing", "elements", "steps"))
        ratios = (float(data[name]) for name in ("of_token", "of_bound", "first_gemm"))
        return cls(differing, elements, steps, *ratios)


def distance(first: Tensor, second: Tensor, allowed: Tensor, *, first_gemm: float = 0.0) -> Distance:
    """Between two outputs (T, H) of one dtype; `allowed` (T, H) is how far they may be apart."""
    found = difference(first, second)
    if not found.differing:
        return Distance(0, found.elements, 0, 0.0, 0.0, first_gemm)
    one, other = first.double(), second.double()
    equal = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = torch.maximum(one.abs(), other.abs()).nan_to_num(nan=0.0, posinf=0.0).amax(-1, keepdim=True)
    return Distance(
        found.differing,
        found.elements,
        found.steps,
        _largest_ratio(apart, largest),
        _largest_ratio(apart, allowed),
        first_gemm,
    )


def _largest_ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(torch.where(numerator == 0, 0.0, numerator / denominator).amax())


@dataclass(frozen=True, eq=False)
class Emulation:
    """One case on several devices.

    Args:
        case: the case.
        tile: rows of the tiles that our kernels take for it.
        trace: the recipe oracle, which knows no device.
        replays: each device's output and stages, by name.
    """

    case: Case
    tile: int
    trace: RecipeTrace
    replays: Mapping[str, Replay]
    _limits: dict[str, Tensor] = field(default_factory=dict)

    def arithmetic(self, name: str) -> Arithmetic:
        return DEVICES[name].by_tile[self.tile]

    def limit(self, name: str) -> Tensor:
        """(T, H): how far a device's output may be from the recipe oracle's, whichever way roundings flip."""
        if name not in self._limits:
            total = allowance_for(self.trace, self.arithmetic(name)).total
            reach = self.trace.smooth.abs() + total
            self._limits[name] = total + 2 * half_spacing(reach, self.trace.problem.carrier)
        return self._limits[name]

    @cached_property
    def distances(self) -> dict[tuple[str, str], Distance]:
        """Of each pair of devices, the earlier one first."""
        return {pair: self._distance(*pair) for pair in combinations(self.replays, 2)}

    def _distance(self, one: str, other: str) -> Distance:
        first, second = self.replays[one], self.replays[other]
        gemm = difference(first.stages["first_gemm"], second.stages["first_gemm"])
        return distance(
            first.output,
            second.output,
            self.limit(one) + self.limit(other),
            first_gemm=gemm.differing / gemm.elements if gemm.elements else 0.0,
        )


def emulate(case: Case, devices: Iterable[str] = tuple(DEVICES)) -> Emulation:
    """Replays our recipe on each device, in the arithmetic of the tile height that the case's size leads to.

    Raises:
        ValueError: an unknown device, or a case that our FP8 kernels do not take; the text says what they take.
    """
    names = tuple(dict.fromkeys(devices))
    for name in names:
        if name not in DEVICES:
            raise ValueError(f"device {name!r}: expected one of {', '.join(DEVICES)}")
    if case.scheme not in EMULATED_SCHEMES:
        raise InvalidCase("scheme", case.scheme, f"one of {', '.join(EMULATED_SCHEMES)}, which our FP8 kernels take")
    if case.fnuz:
        raise InvalidCase("fnuz", True, "False: our kernels take weights of e4m3fn, on every device")
    tensors = tensors_of(case, "cpu")
    contract = contract_on(PLATFORMS["h100"], False, tensors.config, tensors.quant, batched=False)
    pairs = int(tensors.topk_ids.numel())
    steps = contract.steps_for(pairs)
    assert steps is not None  # these, and the recipe, are the same on every device
    oracles = oracles_of(case, contract.recipe, None, "cpu", by_bits=False)
    tile = tile_height(pairs, case.experts)
    replays = {name: oracles.replay(DEVICES[name].by_tile[tile], steps) for name in names}
    return Emulation(case, tile, oracles.trace, replays)


def check_device(emulation: Emulation, name: str) -> CheckResult:
    """Whether a device's output lies within the bound of its own arithmetic, which was derived without the replay.

    The output is rounded to 16 bits, which hides most of what a good unit does; so the first GEMM, in fp32, is held to
    its bound as well.
    """
    arithmetic, replay = emulation.arithmetic(name), emulation.replays[name]
    wild = [stage for stage, values in replay.stages.items() if not bool(values.isfinite().all())]
    judgement = judge(emulation.trace, replay.output, arithmetic)
    statistics = {**judgement.statistics, "first_gemm": _first_gemm_ratio(emulation, name)}
    reasons = [f"not finite: {', '.join(wild)}"] if wild else []
    reasons += [] if judgement.passed else [f"{judgement.reason}: {judgement.worst}"]
    if not statistics["first_gemm"] <= 1:
        reasons.append(f"first_gemm = {statistics['first_gemm']:.3g} > 1: the first GEMM is outside its bound")
    return CheckResult(
        "computes",
        CHECK,
        Status.FAILED if reasons else Status.PASSED,
        BACKEND + name,
        emulation.case.scheme,
        str(emulation.case),
        "; ".join(reasons),
        judgement.error_over_bound,
        Evidence.SIMULATED,
        statistics,
        f"python -m fp8moe emulate {emulation.case}" if reasons else "",
        measured=_measured(emulation, name),
    )


def _first_gemm_ratio(emulation: Emulation, name: str) -> float:
    trace = emulation.trace
    error = (emulation.replays[name].stages["first_gemm"].double() - trace.first).abs()
    return _largest_ratio(error, first_gemm_error(trace, emulation.arithmetic(name))) if error.numel() else 0.0


def _measured(emulation: Emulation, name: str) -> dict[str, float]:
    """The distances to the devices that come after this one, as figures of a result."""
    found: dict[str, float] = {"tile": emulation.tile}
    for (one, other), apart in emulation.distances.items():
        if one == name:
            found |= {f"{other}/{key}": value for key, value in asdict(apart).items()}
    return found


def looser_bounds(emulation: Emulation) -> list[str]:
    """Pairs of devices whose bounds are the wrong way round, in words.

    A unit that keeps more bits, fp32 above all, must not be allowed more. Bounds are compared by their sum over the
    output, before its own rounding. Where there is nothing to truncate, in outputs of zeros, they are equal.
    """

    def bits(name: str) -> float:
        kept = emulation.arithmetic(name).fraction_bits
        return torch.inf if kept is None else kept

    totals = {
        name: float(allowance_for(emulation.trace, emulation.arithmetic(name)).total.sum())
        for name in emulation.replays
    }
    return [
        f"{better} keeps more bits than {worse} and is allowed more: {totals[better]:.4g} > {totals[worse]:.4g}"
        for better in totals
        for worse in totals
        if bits(better) > bits(worse) and totals[better] > totals[worse]
    ]


TABLE_LEGEND = (
    "above the diagonal: share of the output's elements that differ, most steps of its format between two of them,\n"
    "(share of the first GEMM's elements that differ, in fp32);\n"
    "below: largest |difference| over the token's largest output, and over the sum of the two bounds"
)


def table(emulation: Emulation) -> Table:
    """Device by device; `TABLE_LEGEND` says what is where."""
    made = Table(title=f"{TITLE}, tiles of {emulation.tile} rows", title_justify="left")

    def above(apart: Distance) -> str:
        output = f"{apart.share:.2%}, {apart.steps}" if apart.differing else "equal"
        return f"{output} ({apart.first_gemm:.0%})"

    def below(apart: Distance) -> str:
        return f"{apart.of_token:.1e}, {apart.of_bound:.2f}" if apart.differing else "equal"

    names = tuple(emulation.replays)
    _fill(
        made,
        names,
        {pair: above(apart) for pair, apart in emulation.distances.items()},
        {pair: below(apart) for pair, apart in emulation.distances.items()},
    )
    return made


def _fill(
    made: Table, names: Sequence[str], above: Mapping[tuple[str, str], str], below: Mapping[tuple[str, str], str]
) -> None:
    """A row and a column for each name; texts by pair, the earlier name first."""
    made.add_column("", no_wrap=True)
    for name in names:
        made.add_column(name, no_wrap=True, justify="right")
    for row, one in enumerate(names):
        texts = [
            "" if row == column else above.get((one, other), "") if row < column else below.get((other, one), "")
            for column, other in enumerate(names)
        ]
        made.add_row(one, *texts)


LEGEND = (
    f"above the diagonal with tiles of {LARGE_TILE} rows, below with {SMALL_TILE}: share of the outputs' elements that "
    "differ, the largest\n"
    "|difference| over its token's largest output, (share of the first GEMM's that differ, in fp32)\n"
    "evidence: simulated, replayed on the CPU; none of these devices was used, and gfx942's arithmetic is assumed"
)


def summary_table(results: Iterable[CheckResult]) -> Table | None:
    """Of all cases of a run together; None where there are none."""
    cases = [result for result in results if result.check == CHECK and "tile" in result.measured]
    together: dict[float, dict[tuple[str, str], str]] = {SMALL_TILE: {}, LARGE_TILE: {}}
    for tile, texts in together.items():
        for one, other in combinations(DEVICES, 2):
            found = [
                result.measured
                for result in cases
                if result.backend == BACKEND + one
                and result.measured["tile"] == tile
                and f"{other}/steps" in result.measured
            ]
            if found:
                texts[one, other] = _together(found, other)
    if not any(together.values()):
        return None
    made = Table(title=TITLE, title_justify="left", box=None, padding=(0, 1, 0, 0))
    _fill(made, tuple(DEVICES), together[LARGE_TILE], together[SMALL_TILE])
    return made


def _together(found: Sequence[Mapping[str, float]], other: str) -> str:
    differing = sum(figures[f"{other}/differing"] for figures in found)
    elements = sum(figures[f"{other}/elements"] for figures in found)
    farthest = max(figures[f"{other}/of_token"] for figures in found)
    first_gemm = sum(figures[f"{other}/first_gemm"] for figures in found) / len(found)
    output = f"{differing / elements:.1%} {farthest:.0e}" if differing else "equal"
    return f"{output} ({first_gemm:.0%})"


def summary_lines(results: Iterable[CheckResult]) -> list[str]:
    """How many outputs hold their bounds, and what was not run and why."""
    mine = [result for result in results if result.check == CHECK]
    judged = [result for result in mine if result.status in (Status.PASSED, Status.FAILED)]
    lines = []
    if judged:
        held = [result for result in judged if result.status is Status.PASSED]
        closest = max((result.statistics["first_gemm"] for result in held), default=0.0)
        lines.append(
            f"emulated: {len(held)} of {len(judged)} outputs within the bound of their own arithmetic; "
            f"largest error/bound of the first GEMM {closest:.2f}"
        )
    return lines + [f"not run: emulated: {result.reason}" for result in mine if result.status is Status.NOT_RUN]
