"""The fingerprint of a dot product: every known unit is told, fp32 in any order, units nobody knows, and nonsense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conformance.probe.device import scaled_mm_dot
from conformance.probe.fingerprint import NEVER, Dot, Fingerprint, Unreadable, fingerprint
from conformance.probe.known import emulated_dot, error, expected, family_of, nearest
from conformance.probe.questions import BLOCK, EIGHTS, PROFILES, TERMS, sheet
from conformance.probe.selftest import Identified, dtype_of, identify_units, rounded
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Arithmetic
from fp8moe.reference.units import UNITS, Unit

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
ROUNDING = {
    "14 bits toward zero": (14, "toward zero"),
    "fp32 toward zero": (24, "toward zero"),
    "fp32 to nearest": (24, "to nearest"),
}


def asked(dot: Dot, dtype: torch.dtype = torch.float8_e4m3fn) -> Fingerprint:
    return fingerprint(rounded(dot), dtype=dtype)


# -- the questions --


@pytest.mark.parametrize("dtype", FORMATS)
def test_exact_sums_of_the_questions_are_what_survives(dtype: torch.dtype) -> None:
    """In float64 every small term survives: the answer is 1, or 3/4, or what 2^-24 + 2^-33 are of 2^-23."""
    questions = sheet(dtype)
    found = questions.answers(questions.a.double() @ questions.b.double().T)
    for question, answer in zip(questions.questions, found.tolist(), strict=True):
        expects = {"terms": 0.75, "result": 0.75, "promotion": 0.5 + 2.0**-10}.get(question.family, 1.0)
        assert answer == expects, question


@pytest.mark.parametrize("dtype", FORMATS)
def test_no_question_uses_the_last_position_of_a_block(dtype: torch.dtype) -> None:
    questions = sheet(dtype)
    assert not bool(questions.b.float()[:, BLOCK - 1 :: BLOCK].any())
    largest = questions.a.float().view(len(PROFILES), -1, BLOCK).amax(-1)
    assert bool((largest == torch.finfo(dtype).max).all())


def test_eight_equal_terms_lie_in_the_second_group() -> None:
    for (order, group), positions in EIGHTS.items():
        halves = [k for k in range(TERMS) if k % 32 == k and k % 4 < 2]
        halves += [k for k in range(TERMS) if k % 32 == k and k % 4 > 1]
        second = halves[group : 2 * group] if order == "fours_halved" else range(group, 2 * group)
        assert len(positions) == 8
        assert set(positions) <= set(second)


# -- known units --


@pytest.fixture(scope="module")
def identified() -> list[Identified]:
    return identify_units()


def test_every_unit_is_told(identified: list[Identified]) -> None:
    assert [row.given for row in identified if not row.right] == []
    assert {row.given.unit for row in identified} == set(UNITS)


def test_what_is_told_of_a_unit_is_in_the_table(identified: list[Identified]) -> None:
    for row in identified:
        unit, seen = UNITS[row.given.unit], row.seen
        assert seen.is_fp32 == (unit.name == "fp32")
        if seen.is_fp32:
            continue
        assert (seen.fraction_bits, seen.group) == (unit.fraction_bits, unit.group)
        assert (seen.carried_bits, seen.result) == ROUNDING[unit.result]
        assert seen.promote_every == (row.given.promote_every or NEVER)
        assert seen.k_order == (row.given.k_order if unit.group < 32 else None)
        apart = unit.second_stage_bits is not None
        assert seen.terms == ("down" if apart else "toward zero")
        one_group = seen.promote_every == unit.group
        assert seen.prefix_in_group is (None if one_group else not apart)


def test_units_with_different_numbers_are_told_apart(identified: list[Identified]) -> None:
    """The one arithmetic that has two names of promotion is fp32's, where it makes no difference that shows."""
    lossy = [row for row in identified if row.given.unit != "fp32"]
    numbers = {(row.looks_like[0].units, row.given.promote_every, row.given.k_order) for row in lossy}
    assert len({row.seen for row in lossy}) == len(numbers)
    names = {row.looks_like[0].units for row in lossy}
    assert ("hopper.mma", "blackwell.tcgen05", "rtx_blackwell.mma") in names
    assert {("ada.mma",), ("hopper.wgmma",), ("cdna3.mfma",), ("cdna3.mfma_f16",)} <= names


@pytest.mark.parametrize(
    ("unit", "every", "told"),
    [
        ("hopper.wgmma", 64, 64),
        ("hopper.wgmma", 96, 96),
        ("hopper.wgmma", 256, 256),
        ("hopper.wgmma", 512, NEVER),  # past a third of K no chain is left between X and what cancels it
        ("hopper.mma_f16", 16, 16),
        ("hopper.mma_f16", 256, 256),
        ("cdna3.mfma", 64, 64),
        ("cdna3.mfma", 256, 256),
    ],
)
def test_other_intervals_of_promotion(unit: str, every: int, told: int | str) -> None:
    arithmetic = Arithmetic.on(unit, promote_every=every)
    assert asked(emulated_dot(arithmetic), dtype_of(arithmetic)).promote_every == told


def test_names_of_the_devices_own_family_come_first() -> None:
    seen = expected(Arithmetic.on("hopper.mma", promote_every=128))
    for device, unit in (("h100", "hopper.mma"), ("b200", "blackwell.tcgen05"), ("rtx_pro_6000", "rtx_blackwell.mma")):
        (match,) = nearest(seen, platform=PLATFORMS[device])
        assert match.units[0] == unit
        assert match.declaration == f"Arithmetic.on({unit!r}, promote_every=128)"
    assert family_of(PLATFORMS["mi300x"]) == "cdna3"
    assert family_of(PLATFORMS["cpu"]) == family_of(None) == ""


# -- fp32 in any order --


def product(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().T


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    terms = a.float()[:, None] * b.float()[None]
    terms = torch.nn.functional.pad(terms, (0, 1024 - terms.shape[-1]))
    while terms.shape[-1] > 1:
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def lanes(width: int) -> Dot:
    """As vector instructions sum: `width` running sums side by side, added at the end."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        terms = (a.float()[:, None] * b.float()[None]).view(len(a), len(b), -1, width)
        total = terms[:, :, 0]
        for step in range(1, terms.shape[2]):
            total = total + terms[:, :, step]
        while total.shape[-1] > 1:
            total = total[..., : total.shape[-1] // 2] + total[..., total.shape[-1] // 2 :]
        return total[..., 0]

    return dot


def split(parts: int) -> Dot:
    def dot(a: Tensor, b: Tensor) -> Tensor:
        chunks = zip(a.float().chunk(parts, 1), b.float().chunk(parts, 1), strict=True)
        sums = [lanes(1)(left, right) for left, right in chunks]
        return sum(sums[1:], sums[0])

    return dot


ORDERS: dict[str, Dot] = {
    "BLAS": product,
    "pairwise": pairwise,
    "reverse": lambda a, b: lanes(1)(a.float().flip(1), b.float().flip(1)),
    "permuted": lambda a, b: lanes(1)(a.float()[:, PERMUTED], b.float()[:, PERMUTED]),
    **{f"{width} lanes": lanes(width) for width in (1, 4, 8, 16, 64)},
    **{f"{parts} parts": split(parts) for parts in (4, 5, 10)},
}
PERMUTED = torch.arange(TERMS).view(4, -1).T.reshape(-1)


@pytest.mark.parametrize("order", ORDERS)
def test_fp32_is_fp32_in_any_order(order: str) -> None:
    seen = asked(ORDERS[order])
    assert seen.is_fp32, seen
    assert [match.units for match in nearest(seen)] == [("fp32",)]


# -- sums that no row of the table has --


def running_sum(dtype: torch.dtype, terms: int) -> Dot:
    """fp32 within `terms` of K, added to a running sum that is rounded to `dtype`."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a), len(b))
        for start in range(0, a.shape[1], terms):
            at = slice(start, start + terms)
            total = (total + a[:, at].float() @ b[:, at].float().T).to(dtype).float()
        return total

    return dot


@pytest.mark.parametrize("terms", [1, 32, 128])
def test_a_running_sum_in_bf16_is_not_fp32(terms: int) -> None:
    seen = asked(running_sum(torch.bfloat16, terms))
    assert (seen.aligned, seen.carried_bits, seen.result) == (False, 8, "to nearest")
    assert not seen.is_fp32
    assert error(seen, seen) > error(expected(Arithmetic.on("hopper.wgmma")), seen)


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        (Unit("new", "e4m3fn", 17, 64, "fp32 toward zero"), (17, 64, 18)),  # 24 bits, of which the next group takes 18
        (Unit("new", "e4m3fn", 15, 4, "14 bits toward zero"), (15, 4, 14)),
        (Unit("new", "e4m3fn", 27, 8, "fp32 toward zero"), (27, 8, 24)),
        (Unit("new", "16-bit", 21, 16, "14 bits toward zero"), (21, 16, 14)),
    ],
)
def test_a_unit_that_nobody_described(monkeypatch: pytest.MonkeyPatch, unit: Unit, told: tuple[int, int, int]) -> None:
    monkeypatch.setitem(UNITS, "new", unit)
    dot = emulated_dot(Arithmetic("new", unit.fraction_bits, unit.group, None))
    seen = asked(dot)
    monkeypatch.delitem(UNITS, "new")
    assert (seen.fraction_bits, seen.group, seen.carried_bits) == told
    assert seen.promote_every == NEVER
    assert all("fraction_bits" in match.differing for match in nearest(seen))
    assert nearest(seen)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda a, b: torch.zeros(len(a), len(b)), "came out as 0 X"),
        (lambda a, b: product(a, b) * 1.25, "0.000976562 X came out as 0.0012207 X"),
        (lambda a, b: product(a, b) * torch.nan, "not finite"),
        (lambda a, b: product(a, b).abs(), "came out as"),
        (lambda a, b: product(a, b.roll(1, 0)), "came out as"),
        (lambda a, b: product(a, b).apply_(lambda v: 0.0 if abs(v) == 256 else v), "no rounding of a running sum"),
    ],
)
def test_what_is_no_such_sum_is_told(wrong: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        fingerprint(wrong)


# -- declarations --


def test_a_declaration_in_numbers_is_compared_by_its_numbers() -> None:
    declared = expected(Arithmetic("unknown", fraction_bits=13, group=32, promote_every=128))
    assert expected(Arithmetic.on("hopper.wgmma", promote_every=128)).differing(declared) == []
    assert expected(Arithmetic.on("hopper.wgmma", promote_every=32)).differing(declared) == ["promote_every"]
    assert expected(Arithmetic.on("ada.mma", promote_every=128)).differing(declared) == ["group"]


def test_errors_order_the_arithmetics() -> None:
    """fp32; 24 bits promoted, and never; 14 bits promoted every 32, 128, never; shorter groups are worse."""
    order = (
        Arithmetic(),
        Arithmetic.on("hopper.mma", promote_every=128),
        Arithmetic.on("hopper.mma"),
        Arithmetic.on("hopper.wgmma", promote_every=32),
        Arithmetic.on("hopper.wgmma", promote_every=128),
        Arithmetic.on("ada.mma", promote_every=128),
        Arithmetic.on("hopper.wgmma"),
        Arithmetic.on("ada.mma"),
    )
    errors = [error(expected(arithmetic), expected(arithmetic)) for arithmetic in order]
    assert errors == sorted(set(errors))


# -- the device's own product --


def test_the_devices_product_is_padded_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's function, replaced by an emulated one that insists on what the real one takes."""
    seen = []

    def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype, use_fast_accum: bool) -> Tensor:
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert not any(size % 16 for size in (*a.shape, *b.shape))
        assert float(scale_a) == float(scale_b) == 1.0
        seen.append(use_fast_accum)
        every = None if use_fast_accum else 128
        return emulated_dot(Arithmetic.on("hopper.wgmma", promote_every=every))(a, b.T).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    told = [fingerprint(scaled_mm_dot("cpu", use_fast_accum=fast)).promote_every for fast in (False, True)]
    assert (told, seen) == ([128, NEVER], [False, True])
