"""TritonExperts, a whole MoE, against the formula in float64 with a bound that follows from the arithmetic.

The bound: the first GEMM's error moves the activation's argument, which can move a group's scale and an element to
another code; the farthest code that it can reach times |w2|, the second GEMM's own error, and the output's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig, MoEWeights, RoutingMethodType
from fp8moe.backends.triton_arithmetic import tile_height
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.quant import kFp8Dynamic128Sym, kFp8Static128BlockSym

E4M3 = torch.float8_e4m3fn
BLOCK = 128
U = 2.0**-24
Nearest = Callable[[Tensor], Tensor]
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Case:
    """A layer and one call of it, drawn from its sizes."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    weights: MoEWeights = field(init=False)
    x: Tensor = field(init=False)
    topk_weights: Tensor = field(init=False)
    topk_ids: Tensor = field(init=False)
    extra: dict[str, Any] = field(default_factory=dict)
    global_experts: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(hash((self.tokens, self.hidden, self.intermediate, self.experts)))

        def weight(rows: int, columns: int, parts: int) -> tuple[Tensor, Tensor]:
            codes = (torch.randn(self.experts, rows, columns, generator=generator) * 100).clamp(-448, 448).to(E4M3)
            blocks = (self.experts, parts * -(-(rows // parts) // BLOCK), -(-columns // BLOCK))
            size = torch.rand(blocks, generator=generator) + 0.5
            size = size * 2.0 ** torch.randint(-2, 2, blocks, generator=generator)
            return codes, size / (100 * columns**0.5)

        w13, w13_scale = weight(2 * self.intermediate, self.hidden, 2)
        w2, w2_scale = weight(self.hidden, self.intermediate, 1)
        self.weights = MoEWeights(w13, w2, w13_scale, w2_scale)
        loudness = 2.0 ** torch.randint(-3, 4, (self.tokens, 1), generator=generator)
        self.x = (torch.randn(self.tokens, self.hidden, generator=generator) * loudness).to(self.dtype)
        self.topk_weights = torch.rand(self.tokens, self.top_k, generator=generator)
        # Drawn one by one, so that ids repeat in a row; some are absent.
        self.topk_ids = torch.randint(-1, self.experts, (self.tokens, self.top_k), generator=generator)

    def with_biases(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        w13_bias = torch.randn(self.experts, 2 * self.intermediate, generator=generator).to(dtype)
        w2_bias = torch.randn(self.experts, self.hidden, generator=generator).to(dtype)
        self.weights = replace(self.weights, w13_bias=w13_bias, w2_bias=w2_bias)

    def to(self, device: torch.device) -> None:
        self.weights = self.weights.to(device)
        for name in ("x", "topk_weights", "topk_ids"):
            setattr(self, name, getattr(self, name).to(device))
        self.extra = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.extra.items()
        }

    def backend(self) -> TritonExperts:
        config = FusedMoEConfig(
            num_experts=self.global_experts or self.experts,
            experts_per_token=1,
            hidden_dim=self.hidden,
            intermediate_size_per_partition=self.intermediate,
            num_local_experts=self.experts,
            activation="silu",
            device=self.x.device,
            routing_method=RoutingMethodType.Default,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=self.dtype,
        )
        quant = FusedMoEQuantConfig.from_keys(kFp8Static128BlockSym, kFp8Dynamic128Sym)
        return TritonExperts(config, quant, self.weights)

    def run(self) -> Tensor:
        return self.backend().apply(self.x, self.topk_weights, self.topk_ids, **self.extra)

    @property
    def local_ids(self) -> Tensor:
        expert_map = self.extra.get("expert_map")
        if expert_map is None:
            return self.topk_ids.long()
        return torch.where(self.topk_ids >= 0, expert_map.long()[self.topk_ids.long()], -1)


def dequantised(codes: Tensor, scale: Tensor, parts: int) -> Tensor:
    """(N, K) float64, one expert; each of the `parts` of its rows is blocked apart."""
    rows, columns = codes.shape
    spread = scale.double().reshape(parts, -1, scale.shape[1]).repeat_interleave(BLOCK, 1)[:, : rows // parts]
    return codes.double() * spread.reshape(rows, -1).repeat_interleave(BLOCK, 1)[:, :columns]


def gemm(a: Tensor, w: Tensor, fraction_bits: int | None) -> tuple[Tensor, Tensor]:
    """a @ w^T in float64, and how far a sum in fp32, or in Hopper's 14 bits promoted every 128, can be from it.

    Both are the six-sigma figures of independent roundings of every partial sum.
    """
    z = a.new_zeros(a.shape[0], w.shape[0])
    block, largest, squares, partials = (torch.zeros_like(z) for _ in range(4))
    for start in range(0, a.shape[1], 32):
        x, y = a[:, start : start + 32], w[:, start : start + 32]
        part = x @ y.T
        block = part if start % BLOCK == 0 else block + part
        z += part
        squares += x.square() @ y.square().T
        partials += block.square()
        largest = torch.maximum(largest, z.abs())
    eps = 2 * U * a.shape[1] ** 0.5 * (largest.square() + squares).sqrt() + 4 * U * largest
    if fraction_bits == 13:
        eps += 2.0**-13 * (2 * z.abs() + 4.1 * ((squares + partials / 2) / 2).sqrt())
    return z, eps


def activation(z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up and its error; silu's slope is below 1.1."""
    (gate, up), (gate_eps, up_eps) = z.chunk(2, 1), eps.chunk(2, 1)
    smooth = gate * torch.sigmoid(gate)
    h = smooth * up
    error = 1.1 * gate_eps * (up.abs() + up_eps) + smooth.abs() * up_eps
    return h, error + (6 + gate.abs()) * U * h.abs() + 1e-36


def requantised(h: Tensor, error: Tensor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """h as the second GEMM sees it, and how far it can be from that."""
    rows, columns = h.shape
    groups = -(-columns // BLOCK)

    def scale(magnitude: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(magnitude, (0, groups * BLOCK - columns)).reshape(rows, groups, BLOCK)
        return (padded.amax(-1).clamp(min=1e-10) / 448).repeat_interleave(BLOCK, 1)[:, :columns]

    middle = scale(h.abs())
    value = nearest(h / middle) * middle
    away = torch.zeros_like(value)
    smallest = scale((h.abs() - error).clamp(min=0)) * (1 - 3 * U)
    largest = scale(h.abs() + error) * (1 + 3 * U)
    for corner, sign in product((smallest, largest), (-1, 1)):
        away = torch.maximum(away, (nearest((h + sign * error) / corner) * corner - value).abs())
    return value, away


def expected(case: Case, fraction_bits: int | None, quantised: Quantise, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """The output in float64 and its bound, the output's rounding included."""
    weights, local_ids = case.weights, case.local_ids
    weighted_input = bool(case.extra.get("apply_router_weight_on_input"))
    x = (case.x.float() * case.topk_weights).to(case.dtype) if weighted_input else case.x
    codes, scale = quantised(x)
    a = codes * scale.double().repeat_interleave(BLOCK, 1)[:, : case.hidden]
    result = torch.zeros(case.tokens, case.hidden, dtype=torch.float64, device=x.device)
    bound, total = torch.zeros_like(result), torch.zeros_like(result)
    for expert in range(case.experts):
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        w13 = dequantised(weights.w13[expert], weights.w13_scale[expert], 2)
        w2 = dequantised(weights.w2[expert], weights.w2_scale[expert], 1)
        z, eps = gemm(a[token], w13, fraction_bits)
        if weights.w13_bias is not None:
            z = z + weights.w13_bias[expert].double()
        value, away = requantised(*activation(z, eps + U * z.abs()), nearest)
        y, eps = gemm(value, w2, fraction_bits)
        eps = eps + away @ w2.abs().T * (1 + 2.0**-10)
        if weights.w2_bias is not None:
            y = y + weights.w2_bias[expert].double()
        weight = torch.ones_like(case.topk_weights) if weighted_input else case.topk_weights
        weight = weight[token, slot, None].double()
        result.index_add_(0, token, weight * y)
        bound.index_add_(0, token, weight * eps)
        total.index_add_(0, token, (weight * y).abs())
    bound += (case.top_k + 2) * U * total
    _, exponent = torch.frexp(result.abs() + bound)
    digits, smallest = (8, -133) if case.dtype == torch.bfloat16 else (11, -24)
    spacing = ((exponent - digits).clamp(min=smallest).to(torch.int64) + 1023 << 52).view(torch.float64)  # 2^that
    return result, bound + 0.5 * spacing


def check(case: Case, quantised: Quantise, nearest: Nearest) -> None:
    backend = case.backend()
    got = backend.apply(case.x, case.topk_weights, case.topk_ids, **case.extra)
    assert got.dtype == case.dtype
    assert got.shape == case.x.shape
    arithmetic = backend.contract.arithmetic_for(case.topk_ids.numel())
    fraction_bits = 13 if arithmetic is None else arithmetic.fraction_bits
    if not case.tokens:
        return
    result, bound = expected(case, fraction_bits, quantised, nearest)
    ratio = (got.double() - result).abs() / bound
    worst = int(ratio.argmax())
    at = divmod(worst, case.hidden)
    assert float(ratio.max()) <= 1, (at, float(got[at]), float(result[at]), float(bound[at]), float(ratio.max()))
    absent = (case.local_ids < 0).all(1)
    assert not bool(got[absent].any())
    if fraction_bits != 13 and bool((~absent).any()):
        # The bound must be able to convict: a small part of the values it judges.
        assert float(bound[~absent].median() / result[~absent].square().mean().sqrt()) < 0.02


SIZES = (128, 144, 200, 256)
SHAPES = list(product(SIZES, SIZES))
BATCHES = [
    (tokens, *SHAPES[(5 * i) % 16], experts, top_k)
    for i, (tokens, experts, top_k) in enumerate(product((0, 1, 2, 15, 16, 17, 33), (1, 3, 8), (1, 2, 3)))
]


@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "experts", "top_k"), BATCHES)
def test_any_batch(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    quantised: Quantise,
    nearest: Nearest,
    device: torch.device,
) -> None:
    case = Case(tokens, hidden, intermediate, experts, top_k)
    case.to(device)
    check(case, quantised, nearest)


@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
def test_any_shape(hidden: int, intermediate: int, quantised: Quantise, nearest: Nearest, device: torch.device) -> None:
    case = Case(3, hidden, intermediate, 2, 2)
    case.to(device)
    check(case, quantised, nearest)


def plain(**changes: Any) -> Case:
    return Case(**{"tokens": 9, "hidden": 144, "intermediate": 200, "experts": 4, "top_k": 2, **changes})


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two dimensions' strides exchanged."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_feature() -> dict[str, Case]:
    cases = {"plain": plain(), "fp16": plain(dtype=torch.float16), "biases": plain(), "bf16 biases": plain()}
    cases["biases"].with_biases(torch.float32)
    cases["bf16 biases"].with_biases(torch.bfloat16)
    cases["int32 ids"] = plain()
    cases["int32 ids"].topk_ids = cases["int32 ids"].topk_ids.int()
    cases["weight on input"] = plain(top_k=1, extra={"apply_router_weight_on_input": True})
    cases["weight on input, fp16"] = plain(top_k=1, dtype=torch.float16, extra={"apply_router_weight_on_input": True})
    for dtype in (torch.int32, torch.int64):
        expert_map = torch.tensor([-1, 3, 0, -1, 2, 1, -1], dtype=dtype)
        case = cases[f"map of {dtype}"] = plain(global_experts=7, extra={"expert_map": expert_map})
        case.topk_ids = torch.arange(18).reshape(9, 2) % 8 - 1
    cases["all to one"] = plain(tokens=40)
    cases["all to one"].topk_ids = torch.full((40, 2), 3)
    cases["one twice"] = plain()
    cases["one twice"].topk_ids = torch.tensor([[0, 0], [1, 1], [2, 3]] * 3)
    cases["nobody"] = plain()
    cases["nobody"].topk_ids = torch.full((9, 2), -1)
    case = cases["strided hidden states"] = plain()
    case.x = torch.stack([case.x, case.x.flip(0)], 2)[:, :, 0]
    case = cases["transposed hidden states"] = plain()
    case.x = transposed(case.x)
    case = cases["transposed routing"] = plain()
    case.topk_ids, case.topk_weights = transposed(case.topk_ids), transposed(case.topk_weights)
    case = cases["transposed weights"] = plain()
    case.weights = MoEWeights(
        transposed(case.weights.w13.view(torch.uint8)).view(E4M3),
        transposed(case.weights.w2.view(torch.uint8)).view(E4M3),
        transposed(case.weights.w13_scale),
        transposed(case.weights.w2_scale),
    )
    case = cases["zero rows"] = plain()
    case.x[::2] = 0.0
    case = cases["tiny rows"] = plain()
    case.x[1::2] *= 1e-6
    return cases


FEATURES = every_feature()


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, quantised: Quantise, nearest: Nearest, device: torch.device) -> None:
    case = replace_tensors(FEATURES[name])
    case.to(device)
    check(case, quantised, nearest)


def replace_tensors(case: Case) -> Case:
    """A copy whose `to` leaves the original where it is."""
    copy = object.__new__(Case)
    copy.__dict__.update(case.__dict__, extra=dict(case.extra))
    return copy


def test_given_output(device: torch.device) -> None:
    case = plain()
    case.to(device)
    alone = case.run()
    wide = torch.full((9, 288), 7.0, dtype=case.dtype, device=device)
    case.extra["output"] = wide[:, ::2]
    assert case.run() is case.extra["output"]
    assert torch.equal(wide[:, ::2], alone)
    assert bool((wide[:, 1::2] == 7.0).all())
    case.extra["output"] = case.x  # in place
    assert torch.equal(case.run(), alone)


def test_no_tokens_and_no_slots(device: torch.device) -> None:
    case = plain(tokens=0)
    case.to(device)
    assert case.run().shape == (0, 144)
    case = plain()
    case.topk_ids, case.topk_weights = case.topk_ids[:, :0], case.topk_weights[:, :0]
    case.to(device)
    assert torch.equal(case.run(), torch.zeros_like(case.x))


def test_same_bits_again_whatever_lies_in_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN the second time; pairs that are absent must not bring it in."""
    case = plain(tokens=33)
    case.topk_weights[case.topk_ids < 0] = float("nan")
    case.to(device)
    first = case.run()
    allocate = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = allocate(*size, **options)
        return tensor.view(torch.uint8).fill_(0xFF).view(tensor.dtype) if tensor.numel() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(case.run(), first)
    assert not bool(first.isnan().any())


def test_a_nan_stays_in_its_token(device: torch.device) -> None:
    case = plain()
    case.topk_ids = torch.tensor([[0, 1]] * 8 + [[-1, -1]])
    case.to(device)
    clean = case.run()
    case.x[2, 5] = float("nan")
    case.x[8] = float("nan")
    got = case.run()
    assert bool(got[2].isnan().all())
    assert not bool(got[8].any())
    others = torch.tensor([0, 1, 3, 4, 5, 6, 7], device=device)
    assert torch.equal(got[others], clean[others])


def test_weights_are_left_alone(device: torch.device) -> None:
    case = plain()
    case.to(device)
    before = case.weights.w13.view(torch.uint8).clone(), case.weights.w2.view(torch.uint8).clone(), case.x.clone()
    case.run()
    after = case.weights.w13.view(torch.uint8), case.weights.w2.view(torch.uint8), case.x
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


LARGE = {
    "DeepSeek-V3 at TP8, few": (7, 7168, 256, 32, 8),
    "DeepSeek-V3 at TP8": (1000, 7168, 256, 32, 8),
    "odd sizes": (1000, 1096, 392, 5, 3),
    "one expert": (257, 2048, 512, 1, 1),
}


@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, quantised: Quantise, nearest: Nearest, gpu: torch.device) -> None:
    case = Case(*LARGE[name])
    case.to(gpu)
    check(case, quantised, nearest)
    assert torch.equal(case.run(), case.run())


def test_rows_do_not_depend_on_their_batch(gpu: torch.device) -> None:
    """Where two calls use one tile height: a token's bits are its own, wherever it stands."""
    case = Case(500, 1024, 256, 4, 2)
    case.to(gpu)
    whole = case.run()
    part = replace_tensors(case)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:200].to(gpu)
    part.x, part.topk_ids, part.topk_weights = case.x[order], case.topk_ids[order], case.topk_weights[order]
    assert tile_height(400, 4) == tile_height(1000, 4)
    assert torch.equal(part.run(), whole[order])


@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 4096), (8192, 128)])
def test_buffers_past_two_to_the_31_elements(hidden: int, intermediate: int, gpu: torch.device) -> None:
    few = Case(64, hidden, intermediate, 1, 1)
    few.topk_ids[:] = 0
    few.to(gpu)
    many = replace_tensors(few)
    copies = 2**31 // (8192 * 64) + 2
    many.x, many.topk_ids = few.x.repeat(copies, 1), few.topk_ids.repeat(copies, 1)
    many.topk_weights = few.topk_weights.repeat(copies, 1)
    assert torch.equal(many.run()[-64:], few.run())


def test_captured_in_a_graph(gpu: torch.device) -> None:
    """Nothing in `apply` waits for the device: under capture that would raise."""
    case = Case(33, 256, 144, 4, 2)
    case.to(gpu)
    backend = case.backend()
    eager = backend.apply(case.x, case.topk_weights, case.topk_ids)
    output, x = torch.empty_like(eager), case.x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.apply(x, case.topk_weights, case.topk_ids, output=output)
    graph.replay()
    assert torch.equal(output, eager)
    x.copy_(case.x.flip(0))
    graph.replay()
    assert torch.equal(output, backend.apply(x, case.topk_weights, case.topk_ids))
