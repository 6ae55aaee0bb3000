"""ACME_MOE: the backend's one class. Until its places are filled in, it is fp8moe's reference and no kernel of yours.

A place lies between "fill in" and "end". As written, everything is computed by TorchExperts, so that there is a verdict
from the first minute on; what passes then is the reference.
"""

from __future__ import annotations

from torch import Tensor

from fp8moe import FusedMoEActivationFormat, FusedMoEConfig, MoEWeights, Support
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import FP32, Contract, Recipe
from fp8moe.schemes import BLOCK


class AcmeMoeExperts(TorchExperts):
    """FP8 experts with block scales.

    The checks of a call, the permutation and the sum over a token's experts are TorchExperts'. For kernels that do that
    as well, override `apply` in place of `experts`, and begin it with `self.check_call(...)`.
    """

    # fill in: support
    # What the kernels take, by rule; it is asked about devices that are not here, too, so import nothing for it.
    support = Support(
        device=lambda platform, env: True,  # such as: platform.kind == "cuda" and platform.capability == (9, 0)
        needs="any device",
        scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )
    # end

    # fill in: contract
    # What is rounded where; how a GEMM adds, such as Arithmetic.on("hopper.wgmma", promote_every=128), which `fp8moe
    # probe ACME_MOE` reads off the kernels; and the Steps around it. With all of it bits are compared. What is not
    # known stays None and has a wider bound.
    contract = Contract(recipe=Recipe(), arithmetic=FP32, deterministic=True)
    # end

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)  # checks them, and keeps the checkpoint's layout in self.weights
        # fill in: weights
        # From the checkpoint's layout to the kernels', once, in new tensors. Here, too: the import of a kernel library
        # (BackendUnavailable where it is missing), and LayerNotSupported for sizes that the kernels cannot take.
        # end

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        """Both GEMMs for P token-expert pairs, sorted by expert: pair p is token `source[p]` on expert `expert[p]`.

        Args:
            tokens: (M, H), the dtype of the layer; source, expert: (P,) int64.

        Returns:
            (P, H) fp32, before the routing weights.
        """
        # fill in: experts
        # Quantise, first GEMM, activation, quantise again, second GEMM.
        return super().experts(tokens, source, expert)  # the reference
        # end
