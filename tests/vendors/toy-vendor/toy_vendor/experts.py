"""TOY: the backend's one class, filled in."""

from __future__ import annotations

from torch import Tensor

from fp8moe import FusedMoEActivationFormat, FusedMoEConfig, MoEWeights, Support
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.schemes import BLOCK


class ToyVendorExperts(TorchExperts):
    """FP8 experts with block scales.

    The checks of a call, the permutation and the sum over a token's experts are TorchExperts'. For kernels that do that
    as well, override `apply` in place of `experts`, and begin it with `self.check_call(...)`.
    """

    # fill in: support
    support = Support(
        device=lambda platform, env: True,
        needs="any device",
        scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )
    # end

    # fill in: contract
    contract = Contract(
        recipe=Recipe(),
        arithmetic=Arithmetic.on("fp32", promote_every=128),
        steps=Steps(scale_order="product", scale_fma=False, combine="slot_sum"),
        deterministic=True,
    )
    # end

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)  # checks them, and keeps the checkpoint's layout in self.weights
        # fill in: weights
        from toy_vendor.kernels import scale_of_each_row

        assert weights.w13_scale is not None  # there are scales, since `support` takes no other scheme
        assert weights.w2_scale is not None
        self.w13_scale = scale_of_each_row(weights.w13_scale, config.intermediate_size_per_partition, halves=2)
        self.w2_scale = scale_of_each_row(weights.w2_scale, config.hidden_dim)
        # end

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        """Both GEMMs for P token-expert pairs, sorted by expert: pair p is token `source[p]` on expert `expert[p]`.

        Args:
            tokens: (M, H), the dtype of the layer; source, expert: (P,) int64.

        Returns:
            (P, H) fp32, before the routing weights.
        """
        # fill in: experts
        from toy_vendor.kernels import grouped_gemm, quantised, silu_and_mul

        w = self.weights
        codes, scale = quantised(tokens, self.fp8_dtype)
        gate_up = grouped_gemm(codes[source], scale[source], expert, w.w13, self.w13_scale, w.w13_bias)
        codes, scale = quantised(silu_and_mul(gate_up), self.fp8_dtype)
        return grouped_gemm(codes, scale, expert, w.w2, self.w2_scale, w.w2_bias)
        # end
