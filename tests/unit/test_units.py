"""The replay of matrix units: equal to an H100's bits, to MMA-Sim on every unit, and to the rule in exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8moe.reference import units
from fp8moe.reference.rounding import fma32
from fp8moe.reference.units import UNITS, chain, promoted, promoted_each

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = Path(__file__).parents[1] / "data" / "hopper_fp8.npz"
FP8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}


def equal(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but that NaN equals NaN and -0 equals 0."""
    assert got.dtype == expected.dtype == torch.float32
    assert got.shape == expected.shape
    return bool(((got == expected) | (got.isnan() & expected.isnan())).all())


def dtypes_of(unit: str) -> list[torch.dtype]:
    operands = UNITS[unit].operands
    return [FP8[operands]] if operands in FP8 else [torch.float16, torch.bfloat16]


# ------------------------------------------------------------------------------------------------ an H100's bits


def vector_names() -> list[str]:
    with np.load(VECTORS) as vectors:
        return sorted({name.rsplit("/", 1)[0] for name in vectors.files})


def fours_halved(k: int) -> Tensor:
    """The order in which Triton's layout feeds FP8 that it widens to fp16: in each 32, k mod 4 below 2 first."""
    position = torch.arange(k)
    return torch.argsort(position // 32 * 2 + (position % 4 >= 2), stable=True)


@pytest.mark.parametrize("name", vector_names())
def test_an_h100_computed_these_bits(name: str) -> None:
    kind = name.split("/")[0]
    with np.load(VECTORS) as vectors:
        arrays = {key: torch.from_numpy(vectors[f"{name}/{key}"]) for key in ("a", "b", "out")}
        if kind.startswith("block-scaled"):
            arrays |= {key: torch.from_numpy(vectors[f"{name}/{key}"]) for key in ("a_scale", "b_scale")}
    unit = "hopper.wgmma"
    if kind == "block-scaled-tile16":
        order, unit = fours_halved(arrays["a"].shape[1]), "hopper.mma_f16"
        arrays |= {key: arrays[key][:, order] for key in ("a", "b")}
    a, b = (arrays[key].view(torch.float8_e4m3fn) for key in ("a", "b"))
    total = torch.zeros_like(arrays["out"])
    if kind in ("dot", "unpromoted"):
        total = chain(a, b, unit)
    elif kind.startswith("promoted"):
        for group in promoted(a, b, unit, int(kind.removeprefix("promoted"))):
            total += group
    else:
        for block, group in enumerate(promoted(a, b, unit, 128)):
            total = fma32(group * arrays["a_scale"][:, block, None], arrays["b_scale"][:, block], total)
    assert equal(total, arrays["out"]), float((total == arrays["out"]).float().mean())


# ------------------------------------------------------------------------------------------------------- MMA-Sim

OPERATIONS = {
    "ampere.mma_f16": ("MMA", "Ampere", "m16n8k16.f32.{t}.{t}.f32"),
    "ada.mma": ("MMA", "Ada Lovelace", "m16n8k32.f32.e4m3.e4m3.f32"),
    "ada.mma_f16": ("MMA", "Ada Lovelace", "m16n8k16.f32.{t}.{t}.f32"),
    "hopper.wgmma": ("WGMMA", "Hopper", "m64n8k32.f32.e4m3.e4m3"),
    "hopper.wgmma_f16": ("WGMMA", "Hopper", "m64n8k16.f32.{t}.{t}"),
    "hopper.mma_f16": ("MMA", "Hopper", "m16n8k16.f32.{t}.{t}.f32"),
    "blackwell.tcgen05": ("TCGen05MMA", "Blackwell", "m64n8k32.kind::f8f6f4.f32.e4m3.e4m3"),
    "blackwell.tcgen05_f16": ("TCGen05MMA", "Blackwell", "m64n8k16.kind::f16.f32.{t}.{t}"),
    "blackwell.mma_f16": ("MMA", "Blackwell", "m16n8k16.f32.{t}.{t}.f32"),
    "rtx_blackwell.mma": ("MMA", "RTX Blackwell", "m16n8k32.f32.e4m3.e4m3.f32"),
    "rtx_blackwell.mma_f16": ("MMA", "RTX Blackwell", "m16n8k16.f32.{t}.{t}.f32"),
    "cdna3.mfma": ("MFMA", "CDNA3", "f32_16x16x32_fp8_fp8"),
    "cdna3.mfma_f16": ("MFMA", "CDNA3", "f32_16x16x16_{t}"),
}


def test_every_matrix_unit_but_one_has_an_operation_to_compare_with() -> None:
    # MMA-Sim has no mma.sync of FP8 on Hopper.
    assert {"fp32", "hopper.mma", *OPERATIONS} == set(UNITS)


def simulated(unit: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """MMA-Sim's chain of a unit: vectors (..., K), (..., K) and an accumulator (...)."""
    kind, architecture, name = OPERATIONS[unit]
    module: Any = pytest.importorskip(
        "mmasim.amd" if kind == "MFMA" else "mmasim.nv_ptx",
        reason="mmasim is not installed, or finds no C++ compiler to build its helper with",
        exc_type=Exception,
    )
    operation = getattr(module, kind)(architecture, name.format(t="bf16" if dtype == torch.bfloat16 else "f16"))
    return lambda a, b, c: operation.dpa(a, b, c)


def of_codes(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator, *, largest: float) -> Tensor:
    """Any codes of a dtype whose values are finite and not above `largest`."""
    codes, width = {1: (torch.uint8, 8), 2: (torch.int16, 16)}[dtype.itemsize]
    every = torch.arange(1 << width, dtype=torch.int32).to(codes)
    every = every[every.view(dtype).float().abs() <= largest]
    return every[torch.randint(every.numel(), shape, generator=generator)].view(dtype)


SMALLEST_NORMAL = {torch.float8_e4m3fn: -6, torch.float8_e4m3fnuz: -7, torch.float16: -14, torch.bfloat16: -126}


def drawn(law: str, dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Operands of one law, all finite."""
    smallest = 2.0 ** SMALLEST_NORMAL[dtype]
    if law in ("any code", "subnormal"):
        largest = torch.finfo(dtype).max if law == "any code" else smallest * (1 - 2.0**-11)
        return of_codes(dtype, shape, generator, largest=largest)
    normal = torch.randn(shape, generator=generator)
    if law == "around the smallest":
        normal *= smallest
    if law == "wide":
        reach = 60 if dtype == torch.bfloat16 else 12
        normal *= 2.0 ** torch.randint(-reach, reach // 2, shape, generator=generator)
    if law == "products around the smallest of float32":  # zero but in bf16
        normal *= 2.0 ** torch.randint(-76, -60, shape, generator=generator)
    if law == "cancelling":
        normal[:, shape[1] // 2 :] = -normal[:, : shape[1] - shape[1] // 2]
    if law == "repeated":  # whose product with a cancelling row cancels
        normal[:, shape[1] // 2 :] = normal[:, : shape[1] - shape[1] // 2]
    if law == "zero":
        normal *= 0.0
    return normal.clamp(-(2.0**62), 2.0**62).to(dtype) if dtype == torch.bfloat16 else normal.clamp(-200, 200).to(dtype)


LAWS = (
    *("normal", "wide", "any code", "subnormal", "around the smallest"),
    *("products around the smallest of float32", "cancelling", "repeated", "zero"),
)


def accumulators(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Zeros, values of the size of the products, and values of any size, subnormal ones too, a third each."""
    any_size = 2.0 ** torch.randint(-140, 120, (m, n), generator=generator)
    which = torch.randint(3, (m, n), generator=generator)
    return torch.randn(m, n, generator=generator) * torch.where(which == 0, 0.0, torch.where(which == 1, 1.0, any_size))


@pytest.mark.parametrize(("unit", "dtype"), [(unit, dtype) for unit in OPERATIONS for dtype in dtypes_of(unit)])
@pytest.mark.parametrize("k", [64, 45])
def test_equal_to_mma_sim(unit: str, dtype: torch.dtype, k: int) -> None:
    """Rows of every law against rows of every law."""
    simulate = simulated(unit, dtype)
    generator = torch.Generator().manual_seed(4)
    codes = torch.uint8 if dtype.itemsize == 1 else torch.int16
    a, b = (torch.cat([drawn(law, dtype, (4, k), generator).view(codes) for law in LAWS]).view(dtype) for _ in range(2))
    m, n = len(a), len(b)
    for c in (None, accumulators(m, n, generator)):
        expected = simulate(a[:, None].expand(m, n, k), b[None].expand(m, n, k), torch.zeros(m, n) if c is None else c)
        got = chain(a, b, unit, c)
        different = (got != expected) & ~(got.isnan() & expected.isnan())
        assert equal(got, expected), [(LAWS[i // 4], LAWS[j // 4]) for i, j in different.nonzero().tolist()]


@pytest.mark.parametrize("unit", [unit for unit in OPERATIONS if UNITS[unit].operands == "16-bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_infinities_and_nan_of_16_bits_are_those_of_mma_sim(unit: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    a, b = torch.randn(24, 24, generator=generator), torch.randn(32, 24, generator=generator)
    for operand in (a, b):
        at = torch.rand(operand.shape, generator=generator) < 0.02
        operand[at] = special[torch.randint(4, (int(at.sum()),), generator=generator)]
    a, b = a.to(dtype), b.to(dtype)
    expected = simulated(unit, dtype)(a[:, None].expand(24, 32, 24), b[None].expand(24, 32, 24), torch.zeros(24, 32))
    assert expected.isinf().any()
    assert expected.isnan().any()
    assert equal(chain(a, b, unit), expected)


# --------------------------------------------------------------------------------------- the rule, in exact fractions


def exponent_of(value: Fraction, smallest: int) -> int:
    """floor(log2 |value|), not below `smallest`."""
    exponent = smallest
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return exponent


def toward_zero(value: Fraction, last_bit: int) -> Fraction:
    return int(value / Fraction(2) ** last_bit) * Fraction(2) ** last_bit  # int() truncates


@pytest.mark.parametrize("unit", ["ada.mma", "hopper.wgmma", "hopper.mma", "ampere.mma_f16"])
def test_equal_to_the_rule_in_exact_fractions(unit: str) -> None:
    known, generator = UNITS[unit], torch.Generator().manual_seed(6)
    dtype = dtypes_of(unit)[0]
    smallest = -6 if dtype == torch.float8_e4m3fn else -14
    kept = 14 if known.result.startswith("14") else 24
    for law in ("normal", "wide", "any code"):
        a, b = drawn(law, dtype, (3, 70), generator), drawn(law, dtype, (4, 70), generator)
        a, b = (x.float().nan_to_num(1.0, 1.0, 1.0).to(dtype) for x in (a, b))
        got = chain(a, b, unit)
        for i, j in product(range(3), range(4)):
            left, right = ([Fraction(value) for value in row.tolist()] for row in (a[i].float(), b[j].float()))
            c = Fraction(0)
            for start in range(0, 70, known.group):
                at = slice(start, start + known.group)
                terms = [
                    (x * y, exponent_of(x, smallest) + exponent_of(y, smallest))
                    for x, y in zip(left[at], right[at], strict=True)
                    if x * y != 0
                ]
                terms += [(c, exponent_of(c, -126))] if c else []
                assert known.fraction_bits is not None
                last = max((exponent for _, exponent in terms), default=0) - known.fraction_bits
                c = sum((toward_zero(term, last) for term, _ in terms), Fraction(0))
                c = toward_zero(c, exponent_of(c, -126) + 1 - kept)
            assert Fraction(float(got[i, j])) == c


def test_fp32_is_one_fma_after_the_other() -> None:
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, 50, generator=generator).to(dtype) for n in (3, 5))
        c = torch.randn(3, 5, generator=generator)
        expected = c
        for k in range(50):
            expected = fma32(a[:, k, None].float(), b[:, k].float(), expected)
        assert torch.equal(chain(a, b, "fp32", c), expected)


# ------------------------------------------------------------------------------------------------- what holds for all


def some_operands(unit: str, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    dtype = torch.float32 if unit == "fp32" else dtypes_of(unit)[0]
    draw = [torch.randn(rows, k, generator=generator) * 2.0 ** torch.randint(-6, 6, (rows, k)) for rows in (m, n)]
    return draw[0].to(dtype), draw[1].to(dtype)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [8, 8 * 7, 8 * 500])
def test_the_size_of_the_pieces_does_not_show(unit: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = some_operands(unit, 3, 5, 80)
    c = torch.randn(3, 5)
    whole, start = promoted(a, b, unit, 32), chain(a, b, unit, c)
    monkeypatch.setitem(units._BYTES, "cpu", size)
    assert equal(promoted(a, b, unit, 32), whole)
    assert equal(chain(a, b, unit, c), start)


@pytest.mark.parametrize("unit", UNITS)
def test_chains_rows_and_columns_are_independent_and_zeros_change_nothing(unit: str) -> None:
    a, b = some_operands(unit, 6, 3, 77)
    got = promoted(a, b, unit, 32)
    assert got.shape == (3, 6, 3)
    for i, start in enumerate((0, 32, 64)):
        left, right = a[:, start : start + 32], b[:, start : start + 32]
        assert equal(got[i], chain(left, right, unit))
        padded = [torch.nn.functional.pad(x.float(), (0, 19)).to(x.dtype) for x in (left, right)]
        assert equal(got[i], chain(padded[0], padded[1], unit))
        assert equal(got[i, 2:3, 1:], chain(left[2:3], right[1:], unit))
        assert equal(got[i].T.contiguous(), chain(right, left, unit))
    assert equal(promoted(a, b, unit, None)[0], chain(a, b, unit))
    assert promoted(a[:0], b, unit, 32).shape == (3, 0, 3)
    assert equal(chain(a[:, :0], b[:, :0], unit), torch.zeros(6, 3))


def test_fp8_beside_bf16_is_widened_to_it() -> None:
    a, _ = some_operands("hopper.wgmma", 4, 5, 64)
    b = (torch.randn(5, 64) * 2.0**-130).to(torch.bfloat16)  # sums that are subnormal in float32
    for unit in (unit for unit in UNITS if UNITS[unit].operands in ("16-bit", "any")):
        expected = chain(a.bfloat16(), b, unit)
        assert bool((expected != 0).any())
        assert torch.equal(chain(a, b, unit), expected)
        assert torch.equal(chain(b, a, unit).T, expected)


@pytest.mark.parametrize("unit", UNITS)
def test_nan_in_an_operand_or_in_c_is_nan_there_and_nowhere_else(unit: str) -> None:
    a, b = some_operands(unit, 4, 5, 40)
    codes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    a.view(codes)[1, 7] = {1: 0x80 if a.dtype == torch.float8_e4m3fnuz else 0x7F, 2: 0x7FFF, 4: -1}[a.dtype.itemsize]
    c = torch.zeros(4, 5)
    c[3, 2] = float("nan")
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1], expected[3, 2] = True, True
    assert torch.equal(chain(a, b, unit, c).isnan(), expected)


def test_fp8_is_widened_for_units_that_take_16_bits() -> None:
    a, b = some_operands("hopper.wgmma", 4, 5, 64)
    expected = chain(a.half(), b.half(), "hopper.mma_f16")
    assert torch.equal(chain(a, b, "hopper.mma_f16"), expected)
    assert torch.equal(chain(a, b.half(), "hopper.mma_f16"), expected)
    assert torch.equal(chain(a.bfloat16(), b, "hopper.mma_f16"), expected)


def test_errors_name_the_argument() -> None:
    a, b = some_operands("hopper.wgmma", 4, 5, 64)
    half = a.half()
    cases: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: chain(a, b, "hopper.imma"), r"unit='hopper.imma': expected one of fp32, "),
        (lambda: chain(a, b[:, :63], "hopper.wgmma"), r"a is \(4, 64\), b is \(5, 63\)"),
        (lambda: chain(a[0], b, "hopper.wgmma"), r"a is \(64,\)"),
        (lambda: chain(half, b, "hopper.wgmma"), r"a is torch.float16: convert it to torch.float8_e4m3fn for"),
        (lambda: chain(a, b, "cdna3.mfma"), "convert it to torch.float8_e4m3fnuz for"),
        (lambda: chain(half, half.float(), "hopper.mma_f16"), "b is torch.float32"),
        (lambda: chain(half, half.bfloat16(), "hopper.mma_f16"), "one 16-bit dtype"),
        (lambda: chain(a, b, "hopper.wgmma", torch.zeros(5, 4)), r"c is torch.float32 \(5, 4\)"),
        (lambda: chain(a, b, "hopper.wgmma", torch.zeros(4, 5).double()), "c is torch.float64"),
        (
            lambda: chain(a, b, "hopper.wgmma", torch.zeros(4, 5, device="meta")),
            r"c is torch.float32 \(4, 5\) on meta: expected torch.float32 \(4, 5\) on cpu",
        ),
        (lambda: chain(a, b.to("meta"), "hopper.wgmma"), "b is on meta, a on cpu"),
        (lambda: promoted(a, b, "hopper.wgmma", 0), "every=0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("unit", ["fp32", "hopper.wgmma", "hopper.mma_f16", "cdna3.mfma_f16"])
@pytest.mark.parametrize("every", [None, 32, 48])
def test_rows_with_weights_of_their_own(unit: str, every: int | None) -> None:
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(0, 127, (5, 200), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
    b = torch.randint(0, 127, (5, 7, 200), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
    if every == 48:
        every = 3 * UNITS[unit].group
    each = promoted_each(a, b, unit, every)
    for row in range(5):
        assert torch.equal(each[:, row], promoted(a[row : row + 1], b[row], unit, every)[:, 0])
