"""Honest backends that compute differently, faulty ones, and a simulator of matrix units: to test judges with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.recipe import Arithmetic

Product = Callable[[Tensor, Tensor], Tensor]
"""(P, K) and (N, K), float32, to (P, N)."""


def exponents(values: Tensor) -> Tensor:
    return torch.where(values == 0, -(1 << 14), torch.frexp(values)[1].long() - 1)


def powers(exponent: Tensor) -> Tensor:
    return (exponent.clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def simulated_unit(a: Tensor, b: Tensor, arithmetic: Arithmetic, least_exponent: int = -6) -> Tensor:
    """a (M, K) times b (N, K), float64 codes, as a truncating matrix unit adds them: (M, N) float64.

    K in groups; the exponent of a product is the sum of its factors' (at least `least_exponent` each); the products
    and the running sum are truncated to the largest exponent less `fraction_bits`, added, truncated to as many bits.
    """
    bits, group = arithmetic.fraction_bits or 0, arithmetic.group
    left, right = (torch.where(v == 0, -(1 << 14), exponents(v).clamp(min=least_exponent)) for v in (a, b))
    total = a.new_zeros(a.shape[0], b.shape[0])
    running = total.clone()
    for start in range(0, a.shape[1], group):
        here = slice(start, start + group)
        products = a[:, None, here] * b[None, :, here]
        largest = (left[:, None, here] + right[None, :, here]).amax(-1)
        quantum = powers(torch.maximum(largest, exponents(running)) - bits)
        running = (torch.trunc(products / quantum[..., None]).sum(-1) + torch.trunc(running / quantum)) * quantum
        last = powers(exponents(running) - min(bits, 23))
        running = torch.trunc(running / last) * last
        if arithmetic.promote_every and (start + group) % arithmetic.promote_every == 0:
            total, running = (total + running).float().double(), torch.zeros_like(running)
    return (total + running).float().double()


def by_blocks(size: int) -> Product:
    """Blocks of `size` terms, added one after the other."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], b.shape[0])
        for start in range(0, a.shape[1], size):
            total = total + a[:, start : start + size] @ b[:, start : start + size].t()
        return total

    return product


def reverse(a: Tensor, b: Tensor) -> Tensor:
    return a.flip(1) @ b.flip(1).t()


def split4(a: Tensor, b: Tensor) -> Tensor:
    parts = [left @ right.t() for left, right in zip(a.chunk(4, 1), b.chunk(4, 1), strict=True)]
    return sum(parts[1:], parts[0])


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] <= 16:
        return a @ b.t()
    half = a.shape[1] // 2
    return pairwise(a[:, :half], b[:, :half]) + pairwise(a[:, half:], b[:, half:])


def odd_then_even(a: Tensor, b: Tensor) -> Tensor:
    return a[:, 1::2] @ b[:, 1::2].t() + a[:, ::2] @ b[:, ::2].t()


ORDERS: dict[str, Product] = {
    "block": by_blocks(128),
    "eights": by_blocks(8),
    "reverse": reverse,
    "split4": split4,
    "pairwise": pairwise,
    "odd_then_even": odd_then_even,
}


class Ordered(TorchExperts):
    """TorchExperts with another order of K."""

    product: Product

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        result = type(self).product(inputs, self.weight("w13", index))
        bias = self.weights.w13_bias
        return self.rounded(result if bias is None else result + bias[index].float(), self.recipe.gemm1_output)

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        result = type(self).product(intermediate, self.weight("w2", index))
        bias = self.weights.w2_bias
        return self.rounded(result if bias is None else result + bias[index].float(), self.recipe.gemm2_output)


def ordered(product: Product) -> type[Ordered]:
    return type("Ordered", (Ordered,), {"product": staticmethod(product)})


class OtherScaling(TorchExperts):
    """silu through exp2 and a reciprocal; the second quantisation's scale by the reciprocal of 448."""

    def activation(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        sigmoid = torch.reciprocal(1 + torch.exp2(gate * -1.4426950408889634))
        part = self.rounded(gate * sigmoid, self.recipe.gate_output)
        return self.rounded(part * up, self.recipe.activation_output)

    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        width = intermediate.shape[1] if self.quant.a2.shape.col < 0 else self.quant.a2.shape.col
        parts = []
        for part in intermediate.split(width, dim=1):
            scale = part.abs().amax(1, keepdim=True).clamp(min=self.recipe.of_intermediate.amax_floor) * (1.0 / 448)
            parts.append(to_fp8(part * (1.0 / scale)) * scale)
        return torch.cat(parts, dim=1)


def to_fp8(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).float()


class UnitExperts(Ordered):
    """Both GEMMs through a simulated matrix unit, on the codes, with block scales applied to each 128 terms in fp32."""

    unit: Arithmetic

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        return self.rounded(self.through_unit(inputs, "w13", index), self.recipe.gemm1_output)

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        return self.rounded(self.through_unit(intermediate, "w2", index), self.recipe.gemm2_output)

    def through_unit(self, a: Tensor, name: str, index: int) -> Tensor:
        total = a.new_zeros(a.shape[0], getattr(self.weights, name).shape[1])
        codes = getattr(self.weights, name)[index].double()
        scaled = self.weight(name, index).double()
        for start in range(0, a.shape[1], 128):
            here = slice(start, start + 128)
            # The largest code of a group is 448, so that its scale can be read off the dequantised values.
            scale = (a[:, here].double().abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)
            exact = simulated_unit((a[:, here].double() / scale).float().double(), codes[:, here], self.unit)
            ratio = (scaled[:, here].abs().amax(1) / codes[:, here].abs().amax(1).clamp(min=2.0**-9)).float()
            total = total + (exact.float() * scale.float()) * ratio
        return total


def unit_experts(arithmetic: Arithmetic) -> type[UnitExperts]:
    contract = replace(TorchExperts.contract, arithmetic=arithmetic)
    return type("UnitExperts", (UnitExperts,), {"unit": arithmetic, "contract": contract})


# -- faults --


def bf16_sum(a: Tensor, b: Tensor) -> Tensor:
    """The running sum over K is kept in bf16."""
    total = a.new_zeros(a.shape[0], b.shape[0])
    for start in range(0, a.shape[1], 32):
        total = (total + a[:, start : start + 32] @ b[:, start : start + 32].t()).bfloat16().float()
    return total


def without_last_64(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :-64] @ b[:, :-64].t()


class GainOfOnePercent(TorchExperts):
    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        return super().combine(slots, weights * 1.01, present)


class SwappedHalves(TorchExperts):
    def activation(self, gate_up: Tensor) -> Tensor:
        return super().activation(gate_up.roll(gate_up.shape[1] // 2, 1))


class OneBlockScaleOff(TorchExperts):
    def __init__(self, config, quant, weights):
        scale = weights.w13_scale.clone()
        scale[(0,) * scale.dim()] *= 1.05
        super().__init__(config, quant, replace(weights, w13_scale=scale))


class FirstExpertsScale(TorchExperts):
    def __init__(self, config, quant, weights):
        scale = weights.w13_scale[:1].expand_as(weights.w13_scale).contiguous()
        super().__init__(config, quant, replace(weights, w13_scale=scale))


class TruncatingQuantisation(OtherScaling):
    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        parts = []
        for part in intermediate.split(self.quant.a2.shape.col, dim=1):
            scale = part.abs().amax(1, keepdim=True).clamp(min=self.recipe.amax_floor) / 448
            quotient = (part / scale).double()
            step = powers(exponents(quotient).clamp(min=-6) - 3)
            parts.append((torch.trunc(quotient / step) * step).float() * scale)
        return torch.cat(parts, dim=1)


class NotRequantised(TorchExperts):
    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        return intermediate


class PerTokenInstead(TorchExperts):
    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        desc = FusedMoEQuantDesc(self.quant.a2.dtype, GroupShape.PER_TOKEN, False)
        return self.through_fp8(intermediate, desc, None, None)


class LostToken(TorchExperts):
    def apply(self, *args, **kwargs):
        result = super().apply(*args, **kwargs)
        result[-1] = 0
        return result


FAULTS: dict[str, type[TorchExperts]] = {
    "bf16 sum over K": ordered(bf16_sum),
    "last 64 of K dropped": ordered(without_last_64),
    "gain 1%": GainOfOnePercent,
    "gate and up swapped": SwappedHalves,
    "one block scale off by 5%": OneBlockScaleOff,
    "expert 0's scales for all": FirstExpertsScale,
    "truncating quantisation": TruncatingQuantisation,
    "intermediate not requantised": NotRequantised,
    "second quantisation per token": PerTokenInstead,
    "lost token": LostToken,
}
