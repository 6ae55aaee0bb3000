"""Backends that are right and differ: in the order of their sums, in the matrix unit, in what they declare to round.

None may be convicted. `python -m conformance.zoo.honest --cases 300 --seed 0` draws cases and says whether any is.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from conformance.cases import Case, InvalidCase
from conformance.zoo.on_units import BLOCK, on_unit
from conformance.zoo.ordered import Ordered
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.keys import GroupShape
from fp8moe.recipe import Contract, Recipe


class BlocksOf128(Ordered):
    """A partial sum for each 128 of K, promoted to an accumulator one after the other."""

    size: ClassVar[int] = BLOCK

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], weight.shape[0])
        for left, right in zip(torch.split(a, self.size, 1), torch.split(weight, self.size, 1), strict=True):
            total = total + left @ right.t()
        return total


class EightWide(BlocksOf128):
    """Eight terms at a time."""

    size = 8


class Reversed(Ordered):
    """K from its end, block by block."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], weight.shape[0])
        for left, right in zip(torch.split(a.flip(1), 32, 1), torch.split(weight.flip(1), 32, 1), strict=True):
            total = total + left @ right.t()
        return total


class Pairwise(Ordered):
    """Halves of K, added as a tree down to 8 terms."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        half = a.shape[1] // 2
        if half < 8:
            return a @ weight.t()
        return self.product(a[:, :half], weight[:, :half]) + self.product(a[:, half:], weight[:, half:])


class SplitKFour(Ordered):
    """Four parts of K, each summed alone, their fp32 sums added at the end."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        parts = [left @ right.t() for left, right in zip(a.chunk(4, 1), weight.chunk(4, 1), strict=True)]
        return torch.stack(parts).sum(0)


class ScalesAfterTheSum(Ordered):
    """Weights that have one scale for all of K meet it after the sum, as kernels do it, and not before."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        size = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (a @ (weight / size).t()) * size.t()


class NoOrder(Ordered):
    """Blocks of K and slots are added in another order in each call, as atomics do it; declared."""

    contract = replace(TorchExperts.contract, deterministic=False)

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        blocks = zip(torch.split(a, 32, 1), torch.split(weight, 32, 1), strict=True)
        parts = [left @ right.t() for left, right in blocks]
        total = torch.zeros_like(parts[0])
        for place in torch.randperm(len(parts)).tolist():
            total = total + parts[place]
        return total

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        order = torch.randperm(slots.shape[1]).to(slots.device)
        return super().combine(slots[:, order], weights[:, order], present[:, order])


class Undeclared(Reversed):
    """fp32 in an order of its own, and nothing said about it."""

    contract = Contract()


class FusedActivation(Ordered):
    """The activation in the epilogue of the first GEMM: tiles of 64 gate columns beside their up columns, K by 64."""

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        weight, bias = self.weight("w13", index), self.weights.w13_bias
        halves = [torch.split(half, 64) for half in weight.chunk(self.halves)]
        tiles = [_by_64(inputs, torch.cat(tile)).chunk(self.halves, 1) for tile in zip(*halves, strict=True)]
        result = torch.cat([torch.cat(half, 1) for half in zip(*tiles, strict=True)], 1)
        return self.rounded(result if bias is None else result + bias[index].float(), self.recipe.gemm1_output)


def _by_64(a: Tensor, weight: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], weight.shape[0])
    for left, right in zip(torch.split(a, 64, 1), torch.split(weight, 64, 1), strict=True):
        total = torch.addmm(total, left, right.t())
    return total


class FastExponential(Ordered):
    """silu as exp2 and a reciprocal; the intermediate's scale by a product with 1/448, its quotients likewise."""

    def activation(self, gate_up: Tensor) -> Tensor:
        name = self.config.activation
        if name not in ("silu", "swiglustep", "silu_no_mul"):
            return super().activation(gate_up)
        gate, *rest = gate_up.chunk(self.halves, -1)
        sigmoid = torch.reciprocal(1 + torch.exp2(gate * -1.4426950408889634))
        value = gate * torch.where(gate < -88.0, silu(gate) / gate, sigmoid)
        if name == "swiglustep":
            value, rest = value.clamp(max=7.0), [rest[0].clamp(-7.0, 7.0)]
        if rest:
            value = self.rounded(value, self.recipe.gate_output) * rest[0]
        return self.rounded(value, self.recipe.activation_output)

    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        desc = self.quant.a2
        group = desc.shape or GroupShape.PER_TENSOR
        if desc.dtype is None or desc.static or group.is_per_tensor():
            return super().requantize(intermediate, expert)
        width = group.col if group.col > 0 else intermediate.shape[1]
        return torch.cat([self._quantised(part) for part in torch.split(intermediate, width, 1)], 1)

    def _quantised(self, part: Tensor) -> Tensor:
        largest = float(torch.finfo(self.fp8_dtype).max)
        scale = part.abs().amax(1, keepdim=True).clamp(min=self.recipe.of_intermediate.amax_floor) * (1.0 / largest)
        return (part * (1.0 / scale)).clamp(-largest, largest).to(self.fp8_dtype).float() * scale


class BatchedReversed(Reversed, BatchedTorchExperts):
    """The batched format, K from its end."""


ACT_AND_MUL = Recipe(gemm1_output="input", gate_output="input", activation_output="input")
"""As an activation kernel between two GEMMs that reads and writes 16 bits, and multiplies with a function of them."""
DEEPGEMM = Recipe(scale_rounding="power_of_two", gemm1_output="input", activation_output="input", gemm2_output="input")
"""As DeepGEMM's users run it: 16 bits between the kernels."""
FLASHINFER = Recipe(
    scale_division="inverse",
    scaling="reciprocal",
    gemm1_output="input",
    activation_output="input",
    gemm2_output="input",
)
"""As FlashInfer's fused MoE has it with block scales."""
E8M0 = replace(DEEPGEMM, w13="requantised", w2="requantised")
"""Their weights' scales are powers of two as well."""

HONEST: dict[str, type[TorchExperts]] = {
    "blocks_of_128": BlocksOf128,
    "eight_wide": EightWide,
    "reversed": Reversed,
    "pairwise": Pairwise,
    "split_k_4": SplitKFour,
    "scales_after_the_sum": ScalesAfterTheSum,
    "no_order": NoOrder,
    "undeclared": Undeclared,
    "fused_activation": FusedActivation,
    "fast_exponential": FastExponential,
    "bf16_first_result": BlocksOf128.with_recipe(Recipe(gemm1_output="input")),
    "bf16_gate": Pairwise.with_recipe(Recipe(gate_output="input")),
    "bf16_intermediate": Reversed.with_recipe(Recipe(activation_output="input")),
    "bf16_slots": Pairwise.with_recipe(Recipe(gemm2_output="input")),
    "bf16_running_sum": SplitKFour.with_recipe(Recipe(combine="input")),
    "not_requantised": BlocksOf128.with_recipe(Recipe(requantize=False)),
    "weights_alone": EightWide.with_recipe(Recipe(quantize_input=False, requantize=False, activation_output="input")),
    "power_of_two": Reversed.with_recipe(Recipe(scale_rounding="power_of_two")),
    "weighted_slots": Pairwise.with_recipe(Recipe(weighted="input")),
    "rounded_before_bias": SplitKFour.with_recipe(Recipe(bias="input", routing_weights="input")),
    "scale_by_reciprocal": SplitKFour.with_recipe(Recipe(scale_division="reciprocal")),
    "batched_weighted_slots": BatchedReversed.with_recipe(Recipe(weighted="input", scale_division="reciprocal")),
    "by_reciprocal": SplitKFour.with_recipe(Recipe(scaling="reciprocal")),
    "other_floors": Reversed.with_recipe(Recipe(amax_floor=0.0, intermediate_amax_floor=2.0**-9)),
    "rounded_input_weights": Pairwise.with_recipe(Recipe(input_weights="input")),
    "high_floor": BlocksOf128.with_recipe(Recipe(amax_floor=2.0**-12)),
    "batched_reversed": BatchedReversed,
    "batched_bf16_slots": BatchedReversed.with_recipe(Recipe(gemm2_output="input")),
    "hopper": on_unit("Hopper", "hopper.wgmma", "hopper.wgmma_f16"),
    "hopper_never_promoted": on_unit("HopperNeverPromoted", "hopper.wgmma", "hopper.wgmma_f16", None),
    "ada": on_unit("Ada", "ada.mma", "ada.mma_f16"),
    "blackwell": on_unit("Blackwell", "blackwell.tcgen05", "blackwell.tcgen05_f16", None),
    "cdna3": on_unit("Cdna3", "cdna3.mfma", "cdna3.mfma_f16"),
    "flashinfer": on_unit("FlashInfer", "hopper.wgmma", "hopper.wgmma_f16", None, recipe=FLASHINFER),
    "act_and_mul": FastExponential.with_recipe(ACT_AND_MUL),
    "deepgemm": on_unit("DeepGemm", "hopper.wgmma", "hopper.wgmma_f16", recipe=DEEPGEMM),
    "deepgemm_e8m0": on_unit("DeepGemmE8M0", "hopper.wgmma", "hopper.wgmma_f16", recipe=E8M0),
}
"""By name; each declares in its contract what it does, and leaves the rest open."""

EXPERTS, TOP_K, TOKENS = (4, 1, 2, 3, 5, 8), (2, 1, 3, 4), (8, 1, 2, 3, 5, 16, 17, 24)
SIZES = (128, 256, 144, 72, 200, 272, 136, 384, 1024, 2048)
PLACES = (*(None,) * 7, "2:1", "4:2", "3:0")
MOST_BYTES = 1 << 20
LONG_SIZES = (128, 256, 4096, 7168, 16384)
MOST_BYTES_LONG = 1 << 24


def drawn_cases(count: int, seed: int, *, long: bool = False) -> Iterator[Case]:
    """Small cases, each field independent of the others; what does not fit together is drawn again.

    Args:
        long: with a sum over 4,096 products or more, up to 16,384.
    """
    from conformance.vocabulary import DTYPES, LAWS, LAYOUTS, SCHEME_NAMES, VALUES
    from fp8moe.config import ACTIVATIONS

    source = random.Random(seed)
    sizes, most_bytes = (LONG_SIZES, MOST_BYTES_LONG) if long else (SIZES, MOST_BYTES)
    while count:
        scheme, top_k = source.choice(SCHEME_NAMES), source.choice(TOP_K)
        try:
            case = Case(
                experts=source.choice(EXPERTS),
                top_k=top_k,
                hidden=source.choice(sizes),
                inter=source.choice(sizes),
                tokens=source.choice(TOKENS),
                scheme=scheme,
                dtype=source.choice(DTYPES),
                activation=source.choice(ACTIVATIONS),
                law=source.choice(LAWS),
                values=source.choice(VALUES),
                ep=source.choice(PLACES),
                bias=source.random() < 0.5,
                weight_on_input=top_k == 1 and source.random() < 0.5,
                fnuz=scheme != "none" and source.random() < 0.25,
                layout=source.choice(LAYOUTS),
                seed=source.randrange(1_000_000),
            )
        except InvalidCase:
            continue
        if case.weight_bytes <= most_bytes and (not long or max(case.hidden, case.inter) >= LONG_SIZES[2]):
            yield case
            count -= 1


@dataclass
class Tally:
    """What one backend's verdicts came to: error/bound of each case, the largest of each statistic, convictions."""

    ratios: list[float] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    convicted: list[str] = field(default_factory=list)


def measure(
    names: Sequence[str], cases: int, seed: int, seconds: float = math.inf, *, long: bool = False
) -> dict[str, Tally]:
    """Judges each backend on the same drawn cases; begins no case after so many seconds."""
    from conformance.checks import check_case
    from conformance.plan import Subject, Target
    from conformance.results import Status
    from fp8moe.platforms import PLATFORMS

    here = Target("cpu", PLATFORMS["cpu"], "cpu")
    found = {name: Tally() for name in names}
    end = time.monotonic() + seconds
    for case in drawn_cases(cases, seed, long=long):
        if time.monotonic() > end:
            break
        for name, tally in found.items():
            torch.manual_seed(case.seed)  # for those without an order of their own
            subject = Subject(name, HONEST[name], f"conformance.zoo.honest:{HONEST[name].__name__}")
            result = check_case(case, subject, here)
            for statistic, value in result.statistics.items():
                tally.largest[statistic] = max(value, tally.largest.get(statistic, 0.0))
            if result.error_over_bound is not None:
                tally.ratios.append(result.error_over_bound)
            if result.status is not Status.PASSED:
                tally.convicted.append(f"{name}: {result.status.value} on {case}: {result.reason}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints a line for each backend, and every conviction; 1 where there is any."""
    parser = argparse.ArgumentParser(prog="python -m conformance.zoo.honest", description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--long", action="store_true", help="sums over 4,096 to 16,384 products")
    parser.add_argument("--only", nargs="*", choices=HONEST, default=list(HONEST), metavar="NAME")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(given.only, given.cases, given.seed, given.seconds, long=given.long)
    statistics = sorted({name for tally in found.values() for name in tally.largest})
    shown = ", ".join(("largest", "p99", "median", *(f"largest {statistic}" for statistic in statistics)))
    print(f"{'backend':24}{'cases':>6}{'convicted':>10}  error/bound: {shown}")
    for name, tally in found.items():
        ratios = torch.tensor(tally.ratios or [0.0], dtype=torch.float64)
        figures = [float(ratios.max()), float(ratios.quantile(0.99)), float(ratios.median())]
        figures += [tally.largest.get(statistic, 0.0) for statistic in statistics]
        told = "".join(f"{figure:7.3f}" for figure in figures)
        print(f"{name:24}{len(tally.ratios):6}{len(tally.convicted):10}  {told}")
    convicted = [line for tally in found.values() for line in tally.convicted]
    print(*convicted, sep="\n")
    return bool(convicted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
