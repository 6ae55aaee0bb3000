"""A layer of experts whose second GEMM is the crafted products: what lets them through a backend's `apply`.

One expert, top-1, routing weight 1. Every hidden state is 1 in the column of its profile, and the FP8 format's largest
number in the last column of each block of 128, to which no weight gives anything but zero: dynamic scales are 1, and
the first GEMM has one product for each output, exact in any arithmetic. The gate is 64, where silu and gelu are the
identity to the last bit of fp32, and the up projection is the profile; so the intermediate is 64 times the profile, its
largest value in each block is 64 times the format's, and it is quantised again to the profile's own codes with the
scale 64: were the activation or the scale off by some ulps, the codes would still be these. The second GEMM is then
profile times question, each over K = I, and w2's scale takes the 64 away. Sums go through the rounding to bf16 as they
are, since the questions leave at most 8 bits of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.bounds import Judgement, judge
from conformance.probe.fingerprint import Unreadable
from conformance.probe.questions import BLOCK, TERMS, Sheet
from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute as Experts
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract
from fp8moe.reference.recipe import recipe_moe
from fp8moe.scaling import encode, fp8_format
from fp8moe.schemes import SCHEMES
from fp8moe.validation import scale_shape

GATE = 64.0
ACTIVATIONS = ("silu", "gelu")
"""Those with which `GATE` times a number is that number 64-fold."""
MOST_TOKENS = 256


@dataclass(frozen=True, eq=False)
class CraftedLayer:
    """What a backend is made with, and called with."""

    config: FusedMoEConfig
    quant: FusedMoEQuantConfig
    weights: MoEWeights
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    sheet: Sheet

    def output(self, experts_cls: type[Experts]) -> tuple[Tensor, Experts]:
        """What a backend makes of it, and the backend.

        Raises:
            Exception: whatever the backend raises.
        """
        backend = experts_cls(self.config, self.quant, self.weights)
        output = backend.apply(
            self.hidden_states,
            self.topk_weights,
            self.topk_ids,
            expert_map=None,
            apply_router_weight_on_input=False,
            output=None,
        )
        expected = self.hidden_states
        if not isinstance(output, Tensor) or (output.shape, output.dtype) != (expected.shape, expected.dtype):
            raise TypeError(f"apply returned no tensor of shape {tuple(expected.shape)} and {expected.dtype}")
        return output, backend

    def products(self, output: Tensor) -> Tensor:
        """The products of all profiles and questions (P, Q), as an output of this layer has them.

        Raises:
            Unreadable: rows of one profile differ.
        """
        rows = output.detach().cpu()[:, : len(self.sheet.questions)]
        profiles = len(self.sheet.a)
        for first in range(profiles, len(rows), profiles):
            again = rows[first : first + profiles]
            if not torch.equal(again, rows[: len(again)]):
                raise Unreadable("tokens that are alike have results that differ")
        return rows[:profiles]

    def judged(self, output: Tensor, contract: Contract, arithmetic: Arithmetic | None) -> Judgement:
        """The output beside what the declared recipe makes of the layer, by the bound that is derived for it."""
        trace = recipe_moe(
            self.config,
            self.quant,
            contract.recipe,
            self.weights,
            self.hidden_states,
            self.topk_weights,
            self.topk_ids,
            expert_map=None,
            apply_router_weight_on_input=False,
            tokens=None,
        )
        return judge(trace, output, arithmetic)


def crafted_layer(
    asked: Sheet, scheme: str, tokens: int, *, activation: str = "silu", device: torch.device | str = "cpu"
) -> CraftedLayer:
    """The layer for one scheme and number of tokens.

    Args:
        asked: the questions, whose format is that of the weights.
        scheme: a name of `SCHEMES` with FP8 weights and activations.
        tokens: at least one for each profile, at most `MOST_TOKENS`.
        activation: one of `ACTIVATIONS`.
    """
    dtype, profiles = asked.a.dtype, len(asked.a)
    hidden = -(-len(asked.questions) // BLOCK) * BLOCK
    quant = FusedMoEQuantConfig.from_keys(*SCHEMES[scheme])
    config = FusedMoEConfig(
        num_experts=1,
        experts_per_token=1,
        hidden_dim=hidden,
        intermediate_size_per_partition=TERMS,
        num_local_experts=1,
        activation=activation,
        device=device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=MOST_TOKENS,
    )
    w13 = torch.zeros(1, 2 * TERMS, hidden)
    w13[0, :TERMS, :profiles] = GATE
    w13[0, TERMS:, :profiles] = asked.a.float().T
    w2 = torch.zeros(1, hidden, TERMS)
    w2[0, : len(asked.questions)] = asked.b.float()
    group = quant.w1.shape or GroupShape.PER_TENSOR
    static = quant.a1.static
    weights = MoEWeights(
        w13=encode(w13, dtype),
        w2=encode(w2, dtype),
        w13_scale=torch.ones(scale_shape(group, 1, 2 * TERMS, hidden, halves=2)),
        w2_scale=torch.full(scale_shape(group, 1, hidden, TERMS), 1 / GATE),
        a13_scale=torch.ones(1) if static else None,
        a2_scale=torch.full((1,), GATE) if static else None,
    )
    states = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    rows = torch.arange(tokens)
    states[rows, rows % profiles] = 1.0
    states[:, BLOCK - 1 :: BLOCK] = fp8_format(dtype).largest
    return CraftedLayer(
        config,
        quant,
        weights.to(device),
        states.to(device),
        torch.ones(tokens, 1, device=device),
        torch.zeros(tokens, 1, dtype=torch.int32, device=device),
        asked,
    )
