"""The replay oracle: a whole MoE in the arithmetic that a backend declares, bit by bit.

Everything is computed in fp32 as the backend says that it does: the sums of the matrix unit (`units.py`), its scales,
the activation (`portable.py`), the quantisation of the intermediate, the second GEMM, the weighted sum. The output of
a backend that keeps its contract has the same bits. It shares no code with the recipe oracle but the bookkeeping of
token-expert pairs, and takes from it which pairs may set a scale that a whole tensor shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import Arithmetic, Contract, FirstOutput, Steps
from fp8moe.reference.closed import must_be_open
from fp8moe.reference.portable import PORTABLE
from fp8moe.reference.problem import MoEProblem, Pairs, chunk_elements
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.replayed_codes import BLOCK, amaxes, codes_of, requantised, scale_from
from fp8moe.reference.rounding import fma32
from fp8moe.reference.units import UNITS, promoted, promoted_each
from fp8moe.schemes import BLOCK as BLOCK_SCALES
from fp8moe.schemes import CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, TENSOR_TOKEN, UNQUANTISED, scheme_name

STAGES = ("first_gemm", "activation", "requantisation", "second_gemm", "combine")
"""In the order of the computation; `requantisation` only where activations are quantised."""
REPLAYED = frozenset({UNQUANTISED, BLOCK_SCALES, CHANNEL_TOKEN, TENSOR_TOKEN, TENSOR_STATIC, TENSOR_DYNAMIC})
"""The schemes that `Steps` says everything about: the activations quantised as the weights are, or neither."""
WITNESSED_BITS = 20
"""Units of fewer bits, not promoted every block, err by more than the margin within which pairs are replayed that may
set a shared scale (measured: 24% of an element after 7,168 terms of one sign in 14 bits)."""
CHAINS_AT_ONCE = 1 << 25
"""Sums of the unit that are held at a time, in fp32: 128 MiB."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What a call comes to in the declared arithmetic, for the T judged tokens of a recipe trace.

    Args:
        output: (T, H) in the dtype of the hidden states.
        tokens: (T,) the judged tokens' rows.
        pairs: the trace's, sorted by expert; the stages have a row for each.
        stages: by name of `STAGES`: first_gemm (P, 2I or I) fp32 with bias; activation (P, I) fp32; requantisation
            (P, I) fp32, the values of the FP8 codes without their scale; second_gemm (P, H) fp32 with bias, zeros for
            witnesses of a shared scale; combine is `output`.
    """

    output: Tensor
    tokens: Tensor
    pairs: Pairs
    stages: dict[str, Tensor]


def why_not_replayed(
    contract: Contract, quant: FusedMoEQuantConfig, weights: MoEWeights, pairs: int, *, exact_sums: bool = False
) -> str:
    """What keeps a call with `pairs` token-expert pairs from being replayed; "" where nothing does.

    `exact_sums`: whether the sums over each 128 of K are exact, so that fp32's come out the same in any order.
    """
    arithmetic = contract.arithmetic_for(pairs)
    if arithmetic is None or arithmetic.unit == "unknown":
        return "its matrix unit is not declared"
    if contract.steps_for(pairs) is None:
        return "its steps around the matrix unit are not declared"
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in REPLAYED:
        return f"no steps are known for the scheme {scheme_name(*scheme)}"
    recipe = contract.recipe
    if scheme != UNQUANTISED and not (recipe.requantize and recipe.quantize_input):
        return "no steps are known for FP8 weights and inputs that are not quantised"
    if scheme != UNQUANTISED and {recipe.w13, recipe.w2} & {"rounded_scales", "rounded"}:
        return "no steps are known for weights that are rounded with their scales"
    if scheme != UNQUANTISED and recipe.by_factor:
        return "no steps are known for scales that are the reciprocal of a factor"
    if scheme != UNQUANTISED and recipe.gemm1_output == "float8":
        return "no steps are known for a first GEMM's result that is kept in FP8"
    if "input" in (recipe.bias, recipe.routing_weights):
        return "no steps are known for roundings before a bias, or of routing weights"
    unit = UNITS[arithmetic.unit]
    if not unit.takes(weights.w13.dtype):
        return f"its matrix unit {unit.name} does not take {weights.w13.dtype}"
    if unit.name == "fp32" and not (exact_sums and arithmetic.promote_every == BLOCK):
        return "its sums are fp32 in an order of their own"
    coarse = unit.fraction_bits is not None and unit.fraction_bits < WITNESSED_BITS
    if scheme == TENSOR_DYNAMIC and coarse and (arithmetic.promote_every is None or arithmetic.promote_every > BLOCK):
        return "which pair sets a scale that all share is not known well enough with sums of so few bits over so much K"
    if quant.w1.shape is not None and quant.w1.shape.is_block() and arithmetic.promote_every != BLOCK:
        return f"it promotes every {arithmetic.promote_every}, and its scales change every {BLOCK} of K"
    return ""


def replay_moe(trace: RecipeTrace, arithmetic: Arithmetic, steps: Steps) -> Replay:
    """Replays the call of a recipe trace. The caller has asked `why_not_replayed`.

    Where the unit is "fp32", its order of summation is that of K: right for data whose sums are exact.
    """
    must_be_open("replay_moe")
    problem, pairs = trace.problem, trace.pairs
    recipe = problem.recipe
    gemm = _Gemm(problem, arithmetic, steps)
    codes, scale = _first_input(problem, pairs)
    first = gemm("w13", pairs, codes, scale)
    first = _rounded(first, recipe.gemm1_output, problem)
    gate_dtype = problem.hidden_states.dtype if recipe.gate_output == "input" else torch.float32
    values = PORTABLE[problem.config.activation](first, gate_dtype)
    unquantised = problem.quant.a2.dtype is None or not recipe.requantize
    values = _rounded(values, recipe.activation_output, problem)
    stages = {"first_gemm": first, "activation": values}
    if unquantised:
        codes, scale = values.to(problem.hidden_states.dtype), None
    else:
        codes, scale = _second_input(problem, pairs, values)
        stages["requantisation"] = codes
    judged = (pairs.token >= 0).nonzero()[:, 0]
    taken = pairs.take(judged)
    second = first.new_zeros(len(pairs), problem.config.hidden_dim)
    second[judged] = _rounded(
        gemm("w2", taken, codes[judged], None if scale is None else scale[judged]), recipe.gemm2_output, problem
    )
    stages["second_gemm"] = second
    stages["combine"] = _combined(problem, taken, second[judged], steps)
    return Replay(stages["combine"], problem.tokens, pairs, stages)


def _group_of(desc: FusedMoEQuantDesc) -> GroupShape:
    return desc.shape or GroupShape.PER_TENSOR


def _first_input(problem: MoEProblem, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
    """(P, H) what the first GEMM multiplies, in the unit's input dtype; (P, groups) fp32 scales, None without."""
    desc, recipe = problem.a1, problem.recipe
    rows, place = torch.unique(pairs.row, return_inverse=True)
    if desc.dtype is None:
        return problem.inputs[pairs.row], None
    values, group = problem.inputs[rows].float(), _group_of(desc)
    if desc.static:
        assert problem.weights.a13_scale is not None
        scale = problem.weights.a13_scale.reshape(1, 1).expand(len(rows), 1)
    elif group.is_per_tensor() and recipe.dynamic_tensor_scope == "expert":
        return _by_expert(problem, pairs)
    elif group.is_per_tensor():
        everything = problem.inputs.float().abs()
        amax = everything.amax().reshape(1, 1) if everything.numel() else values.new_zeros(1, 1)
        scale = scale_from(amax, problem.fp8, recipe).expand(len(rows), 1)
    else:
        scale = scale_from(amaxes(values, group), problem.fp8, recipe)
    return codes_of(values, scale, problem.fp8, recipe)[place], scale[place]


def _by_expert(problem: MoEProblem, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """As `_first_input`, where an expert's tokens share a scale: all of them, the ones that are not judged too."""
    everyone = problem.all_pairs
    amax = problem.inputs.float().abs().amax(-1) if problem.inputs.numel() else problem.inputs.float().sum(-1)
    scale = scale_from(_largest_by_expert(problem, everyone, amax[everyone.row]), problem.fp8, problem.recipe)
    mine = scale[pairs.expert, None]
    return codes_of(problem.inputs[pairs.row].float(), mine, problem.fp8, problem.recipe), mine


def _largest_by_expert(problem: MoEProblem, pairs: Pairs, values: Tensor) -> Tensor:
    """(E,): the largest of each expert's values, 0 where it has none."""
    zeros = values.new_zeros(problem.config.num_local_experts)
    return zeros.scatter_reduce(0, pairs.expert, values, "amax")


def _second_input(problem: MoEProblem, pairs: Pairs, values: Tensor) -> tuple[Tensor, Tensor]:
    """(P, I) fp32 to the values of its FP8 codes, and (P, groups) scales."""
    desc, recipe, group = problem.quant.a2, problem.recipe.of_intermediate, _group_of(problem.quant.a2)
    if desc.static:
        assert problem.weights.a2_scale is not None
        scale = problem.weights.a2_scale.reshape(1, 1).expand(len(values), 1)
    elif group.is_per_tensor():
        amax = values.abs().amax(-1) if values.numel() else values.new_zeros(len(values))
        if recipe.dynamic_tensor_scope == "expert":
            shared = _largest_by_expert(problem, pairs, amax)[pairs.expert, None]
        else:
            shared = (amax.amax() if len(amax) else amax.new_zeros(())).expand(len(values), 1)
        scale = scale_from(shared, problem.fp8, recipe)
    else:
        scale = scale_from(amaxes(values, group), problem.fp8, recipe)
    return codes_of(values, scale, problem.fp8, recipe), scale


def _rounded(values: Tensor, where: FirstOutput, problem: MoEProblem) -> Tensor:
    """As it is, or through the 16-bit dtype of the hidden states."""
    return values.to(problem.hidden_states.dtype).float() if where == "input" else values


class _Gemm:
    """Both GEMMs of a call: each pair's row times its expert's weight, scaled, plus bias."""

    def __init__(self, problem: MoEProblem, arithmetic: Arithmetic, steps: Steps) -> None:
        self.problem = problem
        self.arithmetic = arithmetic
        self.steps = steps

    def __call__(self, name: str, pairs: Pairs, a: Tensor, a_scale: Tensor | None) -> Tensor:
        """`a` (P, K), its scales (P, groups) or None; to (P, N) fp32."""
        weight, scales = self._operand(name)
        bias: Tensor | None = getattr(self.problem.weights, f"{name}_bias")
        result = torch.empty(len(pairs), weight.shape[1], dtype=torch.float32, device=a.device)
        if not len(pairs):
            return result
        x = a if weight.itemsize > 1 else a.to(weight.dtype)
        for columns in self._columns(weight, len(pairs)):
            chains = self._chains(x, weight[:, columns], pairs)
            w_scale = None if a_scale is None else self._scales(name, scales, pairs, columns)
            total = self._scaled(chains, a_scale, w_scale)
            result[:, columns] = total if bias is None else total + bias[pairs.expert, columns].float()
        return result

    def _operand(self, name: str) -> tuple[Tensor, Tensor]:
        """w13 or w2 and its scales, as they enter the GEMM; without scales where they have none."""
        codes, scale = (getattr(self.problem.weights, key) for key in (name, f"{name}_scale"))
        if scale is None or getattr(self.problem.recipe, name) != "requantised":
            return codes, scale
        parts = self.problem.halves if name == "w13" else 1
        group = self.problem.quant.w1.shape or GroupShape.PER_TENSOR
        return requantised(codes, scale, group, parts, self.problem.fp8)

    def _columns(self, weight: Tensor, pairs: int) -> Iterator[slice]:
        """Parts of N whose chains fit a temporary."""
        every = self.arithmetic.promote_every or weight.shape[2]
        chains = max(-(-weight.shape[2] // every) * pairs, 1)
        step = max(CHAINS_AT_ONCE // chains, 1)
        for start in range(0, weight.shape[1], step):
            yield slice(start, min(start + step, weight.shape[1]))

    def _chains(self, x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        """(C, P, n): the unit's sums for every pair and these columns of its expert."""
        unit, every = self.arithmetic.unit, self.arithmetic.promote_every
        order = k_order(self.arithmetic.k_order, x.shape[1], x.device)
        x = ordered(x, order)
        if x.device.type == "cpu":  # expert by expert, so that operands stay in the cache
            parts = pairs.segments() or [(0, slice(0, 0))]
            sums = [promoted(x[rows], ordered(weight[expert], order), unit, every) for expert, rows in parts]
            return torch.cat(sums, dim=1)
        step = max(chunk_elements(x.device) // max(weight.shape[1] * x.shape[1], 1), 1)
        found = []
        for start in range(0, max(len(pairs), 1), step):
            at = slice(start, start + step)
            codes = weight.view(torch.uint8) if weight.itemsize == 1 else weight
            mine = codes[pairs.expert[at]].view(weight.dtype)
            found.append(promoted_each(x[at], ordered(mine, order), unit, every))
        return torch.cat(found, dim=1)

    def _scales(self, name: str, scales: Tensor, pairs: Pairs, columns: slice) -> Tensor:
        """(P, n, groups) or (P, 1, 1): each pair's expert's scales, one for each row of its weight."""
        scale = scales[pairs.expert]
        if scale.dim() == 1:
            return scale[:, None, None]
        if not self._blocked:
            return scale[:, columns]
        rows = torch.arange(columns.start, columns.stop, device=scale.device)
        half = getattr(self.problem.weights, name).shape[1] // (self.problem.halves if name == "w13" else 1)
        return scale[:, rows // half * -(-half // BLOCK) + rows % half // BLOCK]

    def _scaled(self, chains: Tensor, a_scale: Tensor | None, w_scale: Tensor | None) -> Tensor:
        """(C, P, n) sums of the unit to (P, n). Scales (P, groups) and (P, n or 1, groups), or None."""
        if a_scale is None or w_scale is None:
            return _added(chains)
        if not self._blocked:
            total, left, right = _added(chains), a_scale, w_scale[..., 0]
            one, other = self._factors(total, left, right)
            return one * other
        total = torch.zeros_like(chains[0])
        for block, chain in enumerate(chains):
            left, right = a_scale[:, block, None], w_scale[..., block]
            factors = self._factors(chain, left, right)
            total = fma32(*factors, total) if self.steps.scale_fma else factors[0] * factors[1] + total
        return total

    def _factors(self, sums: Tensor, a_scale: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The two whose product is the scaled sums."""
        if self.steps.scale_order == "product":
            return sums, a_scale * w_scale
        if self.steps.scale_order == "weights_first":
            return sums * w_scale, a_scale
        return sums * a_scale, w_scale

    @property
    def _blocked(self) -> bool:
        group = self.problem.quant.w1.shape
        return group is not None and group.is_block()


def _added(chains: Tensor) -> Tensor:
    """The chains' sums, added in fp32 in their order; the first is taken as it is."""
    total = chains[0]
    for chain in chains[1:]:
        total = total + chain
    return total


def k_order(name: str, columns: int, device: torch.device) -> Tensor | None:
    """The places of K in the order in which the unit gets them, padded to a multiple of 32; None: as they are."""
    if name == "natural":
        return None
    k = torch.arange(-(-columns // 32) * 32, device=device)
    return torch.argsort(k // 32 * 2 + k % 4 // 2, stable=True)


def ordered(values: Tensor, order: Tensor | None) -> Tensor:
    """The last dimension in the order that `k_order` gives; FP8 by its bytes."""
    if order is None:
        return values
    raw = values.view(torch.uint8) if values.itemsize == 1 else values
    return torch.nn.functional.pad(raw, (0, order.numel() - raw.shape[-1]))[..., order].view(values.dtype)


def _combined(problem: MoEProblem, pairs: Pairs, second: Tensor, steps: Steps) -> Tensor:
    """(P, H) fp32 to (T, H): from zero, slot by slot, and rounded once at the end."""
    total = second.new_zeros(problem.tokens.numel(), second.shape[1])
    for slot in range(problem.topk_ids.shape[1]):
        here = (pairs.slot == slot).nonzero()[:, 0]
        token = pairs.token[here]  # each at most once, since a token has one pair a slot
        if problem.apply_router_weight_on_input:
            added = total[token] + _rounded(second[here], problem.recipe.weighted, problem)
        else:
            weight = problem.topk_weights[problem.tokens[token], slot, None]
            if problem.recipe.weighted == "input":  # what is rounded before it is added cannot be fused
                added = total[token] + _rounded(weight * second[here], problem.recipe.weighted, problem)
            elif steps.combine == "slot_fma":
                added = fma32(weight, second[here], total[token])
            else:
                added = total[token] + weight * second[here]
        total[token] = _rounded(added, problem.recipe.combine, problem)
    return total.to(problem.hidden_states.dtype)
