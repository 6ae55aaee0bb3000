"""What matrix units compute, to the bit: a chain of accumulation over K, replayed from a table of units.

K is taken in groups, in order. Every product of a group, and the accumulator c, is truncated toward zero to
`fraction_bits` bits below E, the largest exponent among them; these terms are added exactly; the sum is rounded to the
unit's result, the next c. A product's exponent is the sum of its factors' (it is not normalised, and a subnormal factor
has the exponent of the smallest normal number); a product of zero takes no part. CDNA3: see `_two_stage_step`.
Sources: "hopper.wgmma", and "hopper.mma_f16" with FP8 operands, as measured on an H100; the others but "hopper.mma" as
MMA-Sim (arXiv 2511.10909) models them; "hopper.mma" as "hopper.mma_f16" with groups of 32, which nobody measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8moe.reference.rounding import fma32, power_of_two

Operands = Literal["e4m3fn", "e4m3fnuz", "16-bit", "any"]
Result = Literal["14 bits toward zero", "fp32 toward zero", "fp32 to nearest"]


@dataclass(frozen=True)
class Unit:
    """A matrix unit with an fp32 accumulator.

    Args:
        name: its key in `UNITS`.
        operands: an FP8 format; "16-bit": both fp16 or both bf16, to which FP8 is widened, exactly; "any": also fp32.
        fraction_bits: bits kept below a group's largest exponent when its terms are aligned; None: no alignment.
        group: terms of K that one step adds.
        result: how the sum of a step becomes the accumulator.
        zero_exponent: the smallest E: the exponent of an accumulator that is zero.
        second_stage_bits: bits kept where products are summed first and meet c in a second stage; None: no such stage.
        lanes: positions of a group that are aligned apart: 2 for even and odd ones.
    """

    name: str
    operands: Operands
    fraction_bits: int | None
    group: int
    result: Result
    zero_exponent: int = -133
    second_stage_bits: int | None = None
    lanes: int = 1

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether its operands can have this dtype, or are widened to what it takes, exactly."""
        return dtype in _TAKEN[self.operands]

    @property
    def working_dtype(self) -> torch.dtype:
        """The cheapest dtype in which the sum of a group's truncated products, integers up to 2^(F + 2), is exact."""
        if self.fraction_bits is None or (
            self.operands != "16-bit" and self.group << self.fraction_bits + 2 <= 1 << 24
        ):
            return torch.float32
        return torch.float64


UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        Unit("fp32", "any", None, 1, "fp32 to nearest"),
        Unit("ampere.mma_f16", "16-bit", 24, 8, "fp32 toward zero", -132),
        Unit("ada.mma", "e4m3fn", 13, 16, "14 bits toward zero", -132),
        Unit("ada.mma_f16", "16-bit", 24, 8, "fp32 toward zero", -132),
        Unit("hopper.wgmma", "e4m3fn", 13, 32, "14 bits toward zero"),
        Unit("hopper.wgmma_f16", "16-bit", 25, 16, "fp32 toward zero"),
        Unit("hopper.mma", "e4m3fn", 25, 32, "fp32 toward zero"),
        Unit("hopper.mma_f16", "16-bit", 25, 16, "fp32 toward zero"),
        Unit("blackwell.tcgen05", "e4m3fn", 25, 32, "fp32 toward zero"),
        Unit("blackwell.tcgen05_f16", "16-bit", 25, 16, "fp32 toward zero"),
        Unit("blackwell.mma_f16", "16-bit", 25, 16, "fp32 toward zero"),
        Unit("rtx_blackwell.mma", "e4m3fn", 25, 32, "fp32 toward zero"),
        Unit("rtx_blackwell.mma_f16", "16-bit", 25, 16, "fp32 toward zero"),
        Unit("cdna3.mfma", "e4m3fnuz", 24, 16, "fp32 to nearest", -126, second_stage_bits=31, lanes=2),
        Unit("cdna3.mfma_f16", "16-bit", 24, 8, "fp32 to nearest", -126, second_stage_bits=31),
    )
}

_FP8, _16_BIT = (torch.float8_e4m3fn, torch.float8_e4m3fnuz), (torch.float16, torch.bfloat16)
_TAKEN: dict[Operands, tuple[torch.dtype, ...]] = {
    "e4m3fn": _FP8[:1],
    "e4m3fnuz": _FP8[1:],
    "16-bit": (*_16_BIT, *_FP8),
    "any": (torch.float32, *_16_BIT, *_FP8),
}
_LAYOUT = {  # bits of the mantissa, mask of the exponent field, its bias
    torch.float8_e4m3fn: (3, 0xF, 7),
    torch.float8_e4m3fnuz: (3, 0xF, 8),
    torch.float16: (10, 0x1F, 15),
    torch.bfloat16: (7, 0xFF, 127),
    torch.float32: (23, 0xFF, 127),
}
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ABSENT = -300  # exponent of a sum without terms: below that of any product, and 2^-300 is a normal float64
_ZERO = -1000  # exponent of a factor that is zero: below _ABSENT whatever the other factor is
_BYTES = {"cpu": 1 << 19, "elsewhere": 1 << 28}  # of a temporary: what a core's cache holds, what fills a GPU


def chain(a: Tensor, b: Tensor, unit: str, c: Tensor | None = None) -> Tensor:
    """One accumulation of a unit over all of K, in the order given.

    Args:
        a, b: (M, K) and (N, K) in a dtype that the unit, a key of `UNITS`, takes; K need be no multiple of anything.
        c: (M, N) float32, where the accumulator starts; None for zero.

    Returns:
        float32 (M, N), bit for bit but for the sign of zero and the payload of NaN; a sum past float32 is infinite.

    Raises:
        ValueError: names the argument: unknown unit, shapes, a dtype that the unit does not take, several devices.
    """
    known = _checked(a, b, unit)
    shape = (a.shape[0], b.shape[0])
    if c is not None and (c.dtype, c.shape, c.device) != (torch.float32, shape, a.device):
        raise ValueError(f"c is {c.dtype} {tuple(c.shape)} on {c.device}: expected torch.float32 {shape} on {a.device}")
    return _replay(a, b, known, None, c)[0]


def promoted(a: Tensor, b: Tensor, unit: str, every: int | None) -> Tensor:
    """The chains from zero over each `every` terms of K, whose sums a kernel promotes to an accumulator of its own.

    Args:
        a, b, unit: as for `chain`.
        every: terms of K in a chain, the last of which may have fewer; None: one chain over all of K.

    Returns:
        float32 (C, M, N), C = ceil(K / every): [i] is `chain` over the terms from i * every on.

    Raises:
        ValueError: as `chain`, or `every` is not positive.
    """
    if every is not None and every < 1:
        raise ValueError(f"every={every}: expected a positive number of terms, or None for one chain")
    return _replay(a, b, _checked(a, b, unit), every, None)


def promoted_each(a: Tensor, b: Tensor, unit: str, every: int | None) -> Tensor:
    """As `promoted`, each row of `a` with rows of its own: for a device that is busy only with many of them at once.

    Args:
        a: (P, K).
        b: (P, N, K).
        unit, every: as for `promoted`.

    Returns:
        float32 (C, P, N).

    Raises:
        ValueError: as `promoted`.
    """
    if b.ndim != 3 or b.shape[0] != a.shape[0]:
        raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}: expected (P, K) and (P, N, K)")
    rows, columns, terms = b.shape
    flat = b.reshape(rows * columns, terms)
    if every is not None and every < 1:
        raise ValueError(f"every={every}: expected a positive number of terms, or None for one chain")
    known, every = _checked(a, flat, unit), every or max(terms, 1)
    chains = max(-(-terms // every), 1)
    out = torch.zeros(chains, rows, columns, device=a.device)
    elements = _BYTES.get(a.device.type, _BYTES["elsewhere"]) // known.working_dtype.itemsize
    depth = max(elements // max(rows * columns * every, 1), 1)
    for i in range(0, chains, depth):
        at = slice(i * every, (i + depth) * every)
        x, y = _laid_out(a[:, at], known, every), _laid_out(flat[:, at], known, every)
        shape = (*y.values.shape[:2], rows, columns)
        y = _Factors(y.values.view(shape), y.exponents.view(shape), y.dtype)
        out[i : i + depth] = _chains(known, x[:, :, :, None], y, out[i : i + depth], elements)
    return out if known.fraction_bits is None else out.add_(0.0)  # -0 to +0


def _checked(a: Tensor, b: Tensor, name: str) -> Unit:
    if name not in UNITS:
        raise ValueError(f"unit={name!r}: expected one of {', '.join(UNITS)}")
    unit = UNITS[name]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}: expected (M, K) and (N, K) with one K")
    for which, operand in (("a", a), ("b", b)):
        if not unit.takes(operand.dtype):
            known = " or ".join(map(str, _TAKEN[unit.operands]))
            raise ValueError(f"{which} is {operand.dtype}: convert it to {known} for {name}")
    if unit.operands == "16-bit" and {a.dtype, b.dtype} == set(_16_BIT):
        raise ValueError(f"a is {a.dtype}, b is {b.dtype}: {name} takes one 16-bit dtype; convert one of them")
    if a.device != b.device:
        raise ValueError(f"b is on {b.device}, a on {a.device}: move them to one device")
    return unit


@dataclass(frozen=True)
class _Factors:
    """An operand's values (terms of a chain, chains, rows), their exponents, and the dtype that it came in."""

    values: Tensor
    exponents: Tensor
    dtype: torch.dtype

    def __getitem__(self, at: slice | tuple[slice | None, ...]) -> _Factors:
        return _Factors(self.values[at], self.exponents[at], self.dtype)


def _replay(a: Tensor, b: Tensor, unit: Unit, every: int | None, c: Tensor | None) -> Tensor:
    if b.shape[0] < a.shape[0]:  # products commute, and long rows are what a device is fast at
        return _replay(b, a, unit, every, None if c is None else c.T).transpose(1, 2).contiguous()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain little on operations this short, and on a busy machine wait for each other
    try:
        return _in_pieces(a, b, unit, every or max(a.shape[1], 1), c)
    finally:
        torch.set_num_threads(threads)


def _in_pieces(a: Tensor, b: Tensor, unit: Unit, every: int, c: Tensor | None) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    chains = max(-(-k // every), 1)
    out = torch.zeros(chains, m, n, device=a.device) if c is None else c[None].clone()
    elements = _BYTES.get(a.device.type, _BYTES["elsewhere"]) // unit.working_dtype.itemsize
    rows = max(min(m, elements // max(n, 1)), 1)
    depth = max(elements // max(rows * n, every * n // 4, 1), 1)  # b laid out is a few temporaries, not much memory
    for i in range(0, chains, depth):
        at = slice(i * every, (i + depth) * every)
        x, y = _laid_out(a[:, at], unit, every), _laid_out(b[:, at], unit, every)
        for j in range(0, m, rows):
            c = out[i : i + depth, j : j + rows].contiguous()
            out[i : i + depth, j : j + rows] = _chains(unit, x[:, :, j : j + rows, None], y[:, :, None], c, elements)
    return out if unit.fraction_bits is None else out.add_(0.0)  # -0 to +0


def _laid_out(operand: Tensor, unit: Unit, every: int) -> _Factors:
    """Splits K into chains of whole groups, padded with zeros. Codes are moved, not values: they are the smaller."""
    rows, k = operand.shape
    chains, whole = max(-(-k // every), 1), -(-every // unit.group) * unit.group
    codes = torch.nn.functional.pad(operand.contiguous().view(_CODES[operand.dtype.itemsize]), (0, chains * every - k))
    codes = torch.nn.functional.pad(codes.view(rows, chains, every), (0, whole - every))
    codes = codes.view(rows, chains * whole).T.contiguous().view(chains, whole, rows)
    if operand.dtype in _FP8:
        every_code = torch.arange(256, dtype=torch.uint8, device=operand.device).view(operand.dtype)
        tables = _decoded(every_code.to(torch.float16) if unit.operands == "16-bit" else every_code, unit.working_dtype)
        index = codes.flatten().to(torch.int32)
        values, exponents = (table.index_select(0, index).view(codes.shape) for table in tables)
    else:
        values, exponents = _decoded(codes.view(operand.dtype), unit.working_dtype)
    return _Factors(values.transpose(0, 1), exponents.transpose(0, 1), operand.dtype)


def _decoded(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values in `dtype` and the exponents as int16, _ZERO for zeros."""
    mantissa, mask, bias = _LAYOUT[numbers.dtype]
    values = numbers.to(dtype)
    field = numbers.view(_CODES[numbers.dtype.itemsize]) >> mantissa & mask
    return values, field.to(torch.int16).clamp_(min=1).sub_(bias).masked_fill_(values == 0, _ZERO)


def _chains(unit: Unit, x: _Factors, y: _Factors, c: Tensor, elements: int) -> Tensor:
    """Runs the chains of one piece, from c (chains, rows of x, rows of y) on."""
    if unit.fraction_bits is None:
        exact = not {x.dtype, y.dtype} & {torch.float32, torch.bfloat16}
        for left, right in zip(x.values, y.values, strict=True):
            c = c.addcmul_(left, right) if exact else fma32(left, right, c)  # an exact product need not be fused
        return c
    step = _step if unit.second_stage_bits is None else _two_stage_step
    slab = max(elements // c.numel(), 1)
    for k in range(0, x.values.shape[0], unit.group):
        c = step(unit, x[k : k + unit.group], y[k : k + unit.group], c, slab)
    return c


def _step(unit: Unit, x: _Factors, y: _Factors, c: Tensor, slab: int) -> Tensor:
    """One group, whose terms are its products and c."""
    largest = torch.maximum(_largest_exponent(x, y, slab), _exponent(c, unit.zero_exponent))
    quantum = power_of_two(last_bit := largest - (unit.fraction_bits or 0))
    total = torch.div(c.to(torch.float64), quantum, rounding_mode="trunc")
    total = total.add_(_truncated_sum(unit, x, y, last_bit, slab)).mul_(quantum)
    kept = 14 if unit.result == "14 bits toward zero" else 24
    rounded = (total.view(torch.int64) & -(1 << 53 - kept)).view(torch.float64)
    if torch.bfloat16 in (x.dtype, y.dtype):  # only with it can a sum have bits below the smallest float32
        subnormal = total.abs() < 2.0**-126
        rounded = torch.where(subnormal, torch.div(total, 2.0**-149, rounding_mode="trunc") * 2.0**-149, rounded)
    return rounded.to(torch.float32)


def _two_stage_step(unit: Unit, x: _Factors, y: _Factors, c: Tensor, slab: int) -> Tensor:
    """One group on CDNA3: the products first, each lane by itself, then their sum and c.

    The second stage rounds downwards, the sum of the products to one bit more than is kept of the total, c to as many
    bits as the first stage keeps; the total is rounded downwards as well, and then to fp32.
    """
    bits, wide = unit.fraction_bits or 0, unit.second_stage_bits or 0
    lanes = [(x[lane :: unit.lanes], y[lane :: unit.lanes]) for lane in range(unit.lanes)]
    exponents = [_largest_exponent(left, right, slab) for left, right in lanes]
    largest = torch.stack(exponents).amax(0)
    dot = torch.zeros_like(c, dtype=torch.float64)
    for (left, right), exponent in zip(lanes, exponents, strict=True):
        total = _truncated_sum(unit, left, right, exponent - bits, slab)
        dot += torch.floor(total * power_of_two(exponent - largest))
    of_c = _exponent(c, unit.zero_exponent)
    both = torch.maximum(largest, of_c)
    dot = torch.floor(dot * power_of_two(largest - both + (wide + 1 - bits)))
    start = torch.floor(c.to(torch.float64) * power_of_two(bits - both))
    if unit.lanes > 1:
        start.masked_fill_(of_c < both - (bits + 1), 0.0)  # so far below, c is dropped, not rounded down
    total = (dot + start * 2.0 ** (wide + 1 - bits)) * power_of_two(both - (wide + 1))
    exponent = (total.view(torch.int64) >> 52 & 0x7FF).sub_(1023).clamp_(-126, 1023 - wide)
    return (torch.floor(total * power_of_two(wide - exponent)) * power_of_two(exponent - wide)).to(torch.float32)


def _exponent(c: Tensor, of_zero: int) -> Tensor:
    return (c.view(torch.int32) >> 23 & 0xFF).clamp_(min=1).sub_(127).masked_fill_(c == 0, of_zero)


def _largest_exponent(x: _Factors, y: _Factors, slab: int) -> Tensor:
    """The largest exponent among the products, _ABSENT if all are zero: int32 (chains, rows of x, rows of y)."""
    largest = x.exponents.new_full((*x.exponents.shape[1:3], y.exponents.shape[3]), _ABSENT)
    for k in range(0, x.values.shape[0], slab):
        exponents = x.exponents[k : k + slab] + y.exponents[k : k + slab]
        torch.maximum(largest, exponents[0] if slab == 1 else exponents.amax(0), out=largest)
    return largest.to(torch.int32)


def _truncated_sum(unit: Unit, x: _Factors, y: _Factors, last_bit: Tensor, slab: int) -> Tensor:
    """The sum of the products, each truncated toward zero to a multiple of 2^last_bit, as a multiple of that.

    Division by a power of two is exact, and torch's division that truncates is many times as fast as `torch.trunc`.
    """
    quantum = power_of_two(last_bit)
    if x.values.dtype == torch.float32:  # FP8, whose products, unless all are zero, make for larger exponents than this
        quantum = quantum.clamp_(min=2.0**-126).to(torch.float32)
    total = torch.zeros_like(quantum)
    for k in range(0, x.values.shape[0], slab):
        terms = x.values[k : k + slab] * y.values[k : k + slab]
        if unit.second_stage_bits is not None and torch.bfloat16 in (x.dtype, y.dtype):  # CDNA3: past float32, infinite
            terms = torch.where(terms.abs() >= 2.0**128, terms * torch.inf, terms)
        torch.div(terms, quantum, rounding_mode="trunc", out=terms)
        total += terms[0] if slab == 1 else terms.sum(0)
    return total
