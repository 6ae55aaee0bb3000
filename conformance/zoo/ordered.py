"""TorchExperts whose matrix product is a method: what orders of summation, right or wrong, are planted in."""

from __future__ import annotations

from torch import Tensor

from fp8moe.backends.torch_experts import TorchExperts


class Ordered(TorchExperts):
    """The product in fp32, torch's own here."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        """(P, K) and (N, K), fp32, to (P, N)."""
        return a @ weight.t()

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        result = self.product(inputs, self.weight("w13", index))
        bias = self.weights.w13_bias
        return self.rounded(result if bias is None else result + bias[index].float(), self.recipe.gemm1_output)

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        result = self.product(intermediate, self.weight("w2", index))
        bias = self.weights.w2_bias
        return self.rounded(result if bias is None else result + bias[index].float(), self.recipe.gemm2_output)
