"""The fingerprint through a backend's `apply`: emulated units are told apart, liars convicted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.plan import Subject, Target
from conformance.probe import backend as probe_backend_module
from conformance.probe.backend import CHECK, TOKENS, Probed, Verdict, probe_backend, probed
from conformance.probe.fingerprint import NEVER
from conformance.probe.layer import ACTIVATIONS, GATE, crafted_layer
from conformance.probe.questions import BLOCK, sheet
from conformance.results import CheckResult, Evidence, Status
from conformance.zoo.ordered import Ordered
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.reference.units import UNITS, chain
from fp8moe.registry import BackendUnavailable
from fp8moe.scaling import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Target("cpu", PLATFORMS["cpu"], "cpu")
FNUZ = Target("cpu", PLATFORMS["mi300x"], "cpu")
"""Weights in e4m3fnuz, as that device has them; computed on the CPU all the same."""
SECONDS = 5.0


class UnitExperts(TorchExperts):
    """The second GEMM in the arithmetic `computed`, chain by chain on FP8 codes; one expert, top-1.

    The first one has one product for each output, which is exact in all of them.
    """

    computed: Arithmetic

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        first = self.first_gemm(self.quantize_input(tokens, None)[source], 0)
        values = self.activation(first)
        return self.gemm(*quantize(values, self.quant.a2.shape, self.weights.a2_scale, dtype=self.fp8_dtype))

    def gemm(self, x: Tensor, x_scale: Tensor) -> Tensor:
        w, w_scale = self.weights.w2[0], self.weights.w2_scale[0]
        if not self.quant.w1.shape.is_block():
            return self.chains(x, w) * x_scale.reshape(-1, 1) * w_scale.reshape(1, -1)
        total = torch.zeros(len(x), len(w))
        for block in range(x.shape[1] // BLOCK):
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            rows = w_scale[:, block].repeat_interleave(BLOCK)[: len(w)]
            total = total + self.chains(x[:, at], w[:, at]) * x_scale[:, block, None] * rows
        return total

    def chains(self, x: Tensor, w: Tensor) -> Tensor:
        given = self.computed
        if given.k_order == "fours_halved":
            k = torch.arange(x.shape[1]).view(-1, 8, 4)
            k = torch.cat([k.view(-1, 32)[:, [i for i in range(32) if i % 4 in half]] for half in ((0, 1), (2, 3))], 1)
            x, w = (operand.view(torch.uint8)[:, k.flatten()].view(operand.dtype) for operand in (x, w))
        total = torch.zeros(len(x), len(w))
        for part in range(0, x.shape[1], given.promote_every or x.shape[1]):
            at = slice(part, part + (given.promote_every or x.shape[1]))
            total = total + chain(x[:, at].contiguous(), w[:, at].contiguous(), given.unit)
        return total


def backend(computed: Arithmetic, declared: Arithmetic | Callable[[int], Arithmetic] | None) -> type[UnitExperts]:
    contract = replace(TorchExperts.contract, arithmetic=declared)
    return type("UnitExperts", (UnitExperts,), {"computed": computed, "contract": contract})


def asked(experts_cls: type[TorchExperts], target: Target = CPU, tokens: tuple[int, ...] = TOKENS[:1]) -> Probed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_backend_module, "TOKENS", tokens)  # emulation takes its time, and here all tiles are alike
        return probed(Subject("mine", experts_cls, "mine:Class"), target)


WGMMA_128 = Arithmetic.on("hopper.wgmma", promote_every=128)
WGMMA_NEVER = Arithmetic.on("hopper.wgmma")
MMA_F16 = Arithmetic.on("hopper.mma_f16", promote_every=128, k_order="fours_halved")
HONEST = (
    Arithmetic.on("hopper.wgmma", promote_every=32),
    WGMMA_128,
    WGMMA_NEVER,
    MMA_F16,
    Arithmetic.on("hopper.mma_f16"),
    Arithmetic.on("hopper.mma", promote_every=128),
    Arithmetic.on("ada.mma", promote_every=128),
    Arithmetic.on("ada.mma_f16", promote_every=128),
    Arithmetic.on("ampere.mma_f16"),
    Arithmetic.on("blackwell.tcgen05", promote_every=128),
    Arithmetic.on("blackwell.tcgen05"),
    Arithmetic.on("rtx_blackwell.mma", promote_every=128),
    Arithmetic.on("cdna3.mfma_f16", promote_every=128),
    Arithmetic.on("cdna3.mfma", promote_every=128),
    Arithmetic.on("cdna3.mfma"),
    Arithmetic.on("fp32", promote_every=128),
)


@pytest.fixture(scope="module")
def honest() -> dict[Arithmetic, Probed]:
    """Each probed once."""
    found = {}
    for arithmetic in HONEST:
        target = FNUZ if UNITS[arithmetic.unit].operands == "e4m3fnuz" else CPU
        found[arithmetic] = asked(backend(arithmetic, arithmetic), target)
    return found


# -- the layer --


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_static", "tensor_tok", "tensor_dyn"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_second_gemm_gets_the_profiles_as_they_are(scheme: str, dtype: torch.dtype, activation: str) -> None:
    questions, seen = sheet(dtype), []

    class Watched(TorchExperts):
        def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
            seen.append(super().requantize(intermediate, expert))
            return seen[-1]

    output, _ = crafted_layer(questions, scheme, TOKENS[0], activation=activation).output(Watched)
    profiles = questions.a.float() * GATE
    (got,) = seen
    rows = torch.arange(len(got)) % len(profiles)
    torch.testing.assert_close(got, profiles[rows], rtol=2.0**-22, atol=0.0)
    assert output.dtype == torch.bfloat16


# -- honest backends --


@pytest.mark.parametrize("arithmetic", HONEST, ids=str)
def test_honest_backends_are_as_declared(honest: dict[Arithmetic, Probed], arithmetic: Arithmetic) -> None:
    found, unit = honest[arithmetic], UNITS[arithmetic.unit]
    assert found.result.status is Status.PASSED, found.result.reason
    assert [reading.verdict for reading in found.readings] == [Verdict.AS_DECLARED] * 2
    for reading in found.readings:
        (match,) = reading.looks_like
        assert arithmetic.unit in match.units
        assert reading.seen.fraction_bits == unit.fraction_bits
        if unit.name != "fp32":
            assert reading.seen.group == unit.group
            every = arithmetic.promote_every or (BLOCK if reading.scheme == "block" else NEVER)
            assert reading.seen.promote_every == every


def test_a_backend_takes_seconds() -> None:
    """Of the processor, with all layers, in the emulation of a unit that works in float64."""
    start = time.process_time()
    found = asked(backend(MMA_F16, MMA_F16), tokens=TOKENS)
    assert time.process_time() - start < SECONDS
    assert [reading.verdict for reading in found.readings] == [Verdict.AS_DECLARED] * 4


def test_honest_backends_are_told_apart(honest: dict[Arithmetic, Probed]) -> None:
    """But for hopper.mma = blackwell.tcgen05 = rtx_blackwell.mma and ampere = ada, which are the same numbers."""
    seen = {arithmetic: found.readings[0].seen for arithmetic, found in honest.items()}
    same = [
        {one.unit, other.unit}
        for at, one in enumerate(HONEST)
        for other in HONEST[at + 1 :]
        if seen[one] == seen[other]
    ]
    blackwell = ({"hopper.mma", "blackwell.tcgen05"}, {"hopper.mma", "rtx_blackwell.mma"})
    assert [pair for pair in same if pair not in blackwell] == [{"blackwell.tcgen05", "rtx_blackwell.mma"}]


@pytest.mark.parametrize("experts_cls", [TorchExperts, BatchedTorchExperts])
def test_plain_backends_are_fp32(experts_cls: type[TorchExperts]) -> None:
    found = asked(experts_cls)
    assert (found.result.status, found.result.reason) == (Status.PASSED, "")
    assert all(reading.seen.is_fp32 for reading in found.readings)


def test_the_arithmetic_may_depend_on_the_number_of_tokens() -> None:
    """As our kernels on Hopper: widened to fp16 for small tiles, wgmma for large ones."""

    class TwoTiles(UnitExperts):
        contract = replace(TorchExperts.contract, arithmetic=lambda pairs: MMA_F16 if pairs <= 16 else WGMMA_128)

        def chains(self, x: Tensor, w: Tensor) -> Tensor:
            self.computed = self.contract.arithmetic_for(len(x))
            return super().chains(x, w)

    assert asked(TwoTiles, tokens=TOKENS).result.status is Status.PASSED
    contract = replace(TwoTiles.contract, arithmetic=MMA_F16)
    liar = type("Liar", (TwoTiles,), {"contract": contract, "chains": one_tile_is_coarser})
    found = asked(liar, tokens=TOKENS)
    assert found.result.status is Status.FAILED
    verdicts = {reading.tokens: reading.verdict for reading in found.readings}
    assert verdicts == {16: Verdict.AS_DECLARED, 128: Verdict.WORSE}


def one_tile_is_coarser(self: UnitExperts, x: Tensor, w: Tensor) -> Tensor:
    self.computed = MMA_F16 if len(x) <= 16 else WGMMA_128
    return UnitExperts.chains(self, x, w)


# -- others --


@pytest.mark.parametrize(
    ("computed", "declared", "verdict", "fields"),
    [
        (WGMMA_NEVER, WGMMA_128, Verdict.WORSE, "promote_every"),
        (WGMMA_128, FP32, Verdict.WORSE, "aligned"),
        (WGMMA_128, MMA_F16, Verdict.WORSE, "fraction_bits"),
        (replace(MMA_F16, k_order="natural"), MMA_F16, Verdict.WORSE, "k_order"),
        (Arithmetic.on("ada.mma", promote_every=128), WGMMA_128, Verdict.WORSE, "group"),
        (Arithmetic.on("cdna3.mfma_f16"), FP32, Verdict.WORSE, "aligned"),
        (WGMMA_128, WGMMA_NEVER, Verdict.BETTER, "promote_every"),
        (FP32, WGMMA_NEVER, Verdict.BETTER, "aligned"),
        (MMA_F16, WGMMA_128, Verdict.BETTER, "fraction_bits"),
        (Arithmetic.on("hopper.mma"), WGMMA_128, Verdict.BETTER, "fraction_bits"),
    ],
    ids=lambda value: str(getattr(value, "unit", value)),
)
def test_verdicts(computed: Arithmetic, declared: Arithmetic, verdict: Verdict, fields: str) -> None:
    found = asked(backend(computed, declared))
    row = found.readings[0]
    assert row.verdict is verdict
    assert fields in row.detail.rsplit("they differ in ", 1)[1]
    result = found.result
    assert result.status is (Status.FAILED if verdict is Verdict.WORSE else Status.PASSED)
    assert verdict.value in result.reason
    assert ("declare Arithmetic" in result.reason) == (verdict is Verdict.BETTER)
    assert bool(result.reproduce) == (verdict is Verdict.WORSE)
    assert (result.verdict, result.check, result.evidence) == ("computes", CHECK, Evidence.HARDWARE)
    assert CheckResult.from_json(result.to_json()) == result


def test_block_scales_promote_whoever_declares_what() -> None:
    """A chain cannot outlive its scale; so there a unit that never promotes is as declared, and row scales tell it."""
    found = asked(backend(WGMMA_NEVER, WGMMA_128))
    assert {reading.scheme: reading.verdict for reading in found.readings} == {
        "channel_tok": Verdict.WORSE,
        "block": Verdict.AS_DECLARED,
    }
    assert "K" not in found.result.scope
    assert found.result.scope.startswith("channel_tok with 16 tokens")


def test_an_order_that_nobody_knows_is_not_the_declared_one() -> None:
    class Otherwise(UnitExperts):
        computed = Arithmetic.on("hopper.mma_f16", promote_every=128)
        contract = replace(TorchExperts.contract, arithmetic=computed)

        def chains(self, x: Tensor, w: Tensor) -> Tensor:
            k = torch.arange(x.shape[1]).view(-1, 2, 8, 2).transpose(1, 2).flatten()
            return super().chains(*(operand.view(torch.uint8)[:, k].view(operand.dtype) for operand in (x, w)))

    found = asked(Otherwise)
    assert found.result.status is Status.FAILED
    assert found.readings[0].seen.group is None
    assert "they differ in group" in found.result.reason


@pytest.mark.parametrize("declared", [None, Arithmetic("unknown")])
def test_what_declares_nothing_is_told_what_to_declare(declared: Arithmetic | None) -> None:
    found = asked(backend(WGMMA_128, declared))
    assert {reading.verdict for reading in found.readings} == {Verdict.NOT_DECLARED}
    assert found.result.status is Status.PASSED
    assert "looks like hopper.wgmma; declare Arithmetic.on('hopper.wgmma', promote_every=128)" in found.result.reason


def test_a_declared_unit_must_take_the_operands() -> None:
    found = asked(backend(Arithmetic.on("cdna3.mfma"), WGMMA_128), FNUZ)
    assert found.result.status is Status.FAILED
    assert "declares hopper.wgmma, which does not take torch.float8_e4m3fnuz" in found.result.reason


class Doubled(TorchExperts):
    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        return super().combine(slots, weights * 2, present)


class Noisy(TorchExperts):
    """Tokens that are alike differ by 1/64."""

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        return super().combine(slots, weights * (1 + torch.arange(len(slots)) % 5 / 64)[:, None], present)


class Unsteady(Ordered):
    """Undeclared sums that differ from row to row by less than a matrix unit may cut off."""

    contract = replace(TorchExperts.contract, arithmetic=None)

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        cut = torch.arange(len(a))[:, None] % 5 * 2.0**-16 * (a.abs() @ weight.abs().T)
        return super().product(a, weight) - cut


class Misshapen(TorchExperts):
    def apply(self, *given: Tensor, **options: object) -> Tensor:
        return super().apply(*given, **options)[1:]


def test_what_cannot_be_read_and_is_within_the_bound_is_for_other_checks() -> None:
    found = asked(Unsteady)
    assert {reading.verdict for reading in found.readings} == {Verdict.UNREADABLE}
    assert found.result.status is Status.NOT_APPLICABLE
    assert "alike" in found.result.reason


@pytest.mark.parametrize(
    ("experts_cls", "why"),
    [
        (Doubled, "channel_tok, 16 tokens, the crafted layer: E1"),
        (Noisy, "channel_tok, 16 tokens, the crafted layer: E1"),
        (Misshapen, "no tensor of shape"),
    ],
)
def test_what_cannot_be_read_and_is_wrong_fails(experts_cls: type[TorchExperts], why: str) -> None:
    found = asked(experts_cls)
    assert found.result.status is Status.FAILED
    assert why in found.result.reason


def raising(error: Exception) -> type[TorchExperts]:
    def combine(self: TorchExperts, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        raise error

    return type("Raising", (TorchExperts,), {"combine": combine})


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no"), Status.FAILED), (BackendUnavailable("install it"), Status.NOT_RUN)],
)
def test_what_a_backend_raises(error: Exception, status: Status) -> None:
    result = asked(raising(error)).result
    assert result.status is status
    assert str(error) in result.reason
    assert result.evidence is None


def test_a_contract_that_is_none_is_a_failure() -> None:
    odd = type("Odd", (TorchExperts,), {"contract": replace(TorchExperts.contract, arithmetic=lambda pairs: "wgmma")})
    result = asked(odd).result
    assert result.status is Status.FAILED
    assert "expected a fp8moe.recipe.Arithmetic" in result.reason


def test_a_backend_that_takes_nothing_of_it() -> None:
    class Nothing(TorchExperts):
        @staticmethod
        def is_supported_config(*given: object, **options: object) -> tuple[bool, None]:
            return False, None

    result = asked(Nothing).result
    assert result.status is Status.NOT_SUPPORTED
    assert result.evidence is None


def test_the_interpreter_shows_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_backend_module, "is_simulated", lambda cls, target: True)
    result = probe_backend(Subject("mine", backend(FP32, WGMMA_128), "mine:Class"), CPU)
    assert (result.status, result.evidence) == (Status.NOT_APPLICABLE, Evidence.SIMULATED)
    assert "interpreter" in result.reason
    result = probe_backend(Subject("mine", TorchExperts, "TorchExperts"), CPU)
    assert (result.status, result.evidence) == (Status.PASSED, Evidence.SIMULATED)
