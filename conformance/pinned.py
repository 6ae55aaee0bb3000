"""The cases that every run has: each law, regime and activation once, the sizes at tile edges, published models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from conformance.cases import LAWS, VALUES, Case
from conformance.models import model_and_split
from conformance.plan import Cell, Target
from conformance.strategies import seed_cases
from fp8moe.config import CLAMPED_ACTIVATIONS, FusedMoEActivationFormat

CPU_WEIGHT_BYTES = 128 << 20
GPU_WEIGHT_BYTES = 4 << 30
CPU_TOKENS = 4
GPU_TOKENS = (1, 7, 64, 1000, 4096)
WIDE_BYTES = 1 << 30
WIDE_TOKENS = 64
CHECKPOINT_BYTES = 1 << 30
MODEL_SCHEMES = ("block", "channel_tok", "tensor_tok", "tensor_static", "tensor_dyn")
TILE_EDGES = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129)


def pinned_cases(cell: Cell, *, small: bool) -> Iterator[Case]:
    """Each law, each regime and each activation in one case, the edges of M, N and K, the options of the contract.

    `small` keeps the sizes to what a CPU, or Triton's interpreter, does in a moment.
    """
    base = Case(scheme=cell.scheme, activation=cell.activations[0], tokens=17, experts=4, top_k=2)
    if not small:
        base = replace(base, tokens=130, experts=8, top_k=4, hidden=512, inter=320)
    for law in LAWS:
        yield replace(base, law=law)
    for values in VALUES:
        yield replace(base, values=values, seed=1)
    for activation in cell.activations:
        yield replace(base, activation=activation, seed=2)
    for tokens in TILE_EDGES if not small else TILE_EDGES[:7]:
        yield replace(base, tokens=tokens, seed=3)
    for hidden, inter in ((128, 128), (144, 72), (272, 200), (384, 136)):
        yield replace(base, hidden=hidden, inter=inter, seed=4)
    yield replace(base, dtype="fp16", seed=5)
    yield replace(base, bias=True, seed=6)
    yield replace(base, layout="strided", seed=7)
    yield replace(base, ep="2:1", seed=8)
    yield replace(base, top_k=1, weight_on_input=True, seed=9)
    yield replace(base, top_k=1, weight_on_input=True, ep="2:1", seed=9)
    yield replace(base, experts=1, top_k=1, seed=10)
    yield replace(base, experts=5, top_k=5, values="block_scales", seed=11)
    for activation in CLAMPED_ACTIVATIONS:
        if activation in cell.activations:
            for values in ("loud_quiet", "single_block"):  # both sides of the limits, in gate and in up
                yield replace(base, activation=activation, values=values, tokens=33, seed=12)
    yield replace(base, dtype="fp16", values="loud_quiet", seed=13)
    yield replace(base, dtype="fp16", values="overflow", seed=13)
    # More than a tile's rows, an 8-bit number's worth of pairs, a column that is no multiple of a vector's 16.
    yield replace(base, tokens=130, values="loud_quiet", hidden=136, inter=72, seed=14)
    # Expert ids past 8 bits, and counts.
    yield replace(base, experts=136, hidden=40, inter=24, law="last", tokens=9, seed=15)
    yield replace(base, tokens=300, top_k=1, hidden=128, inter=24, law="last", seed=16)
    # Each where a path of its own is tempting: one token, one row an expert, another rank's experts.
    yield replace(base, tokens=1, law="unnormalised", seed=17)
    yield replace(base, law="one_each", bias=True, seed=18)
    yield replace(base, ep="2:1", bias=True, seed=19)


def simulated_cases(cell: Cell) -> Iterator[Case]:
    """What Triton's interpreter goes through, which takes a third of a second for a case: all but the smallest cross an
    edge of the tiles in M, N and K, and half of them have sums whose bits do not depend on their order.

    Tiles have 16 rows where experts have few pairs on average, and 64 where they have many or come in batches; 128
    columns; and K goes by 128. Three experts share more than twice a tile's rows: one of them has more than a tile.
    """
    batched = cell.subject.experts_cls.activation_format() is FusedMoEActivationFormat.BatchedExperts
    one, several = (65, 100) if batched else (17, 24)  # tokens for one expert to cross an edge, and for one of three
    small = Case(
        scheme=cell.scheme, activation=cell.activations[0], tokens=one, experts=4, top_k=2, hidden=144, inter=136
    )
    shared = replace(small, tokens=several, experts=3)
    large = replace(small, tokens=65, experts=2, top_k=1)
    exact = replace(small, values="exact_sums")
    yield replace(exact, law="all_to_one")
    yield replace(shared, values="exact_sums", law="repeated", seed=1)
    yield replace(shared, values="exact_sums", law="masked", tokens=2 * several, experts=6, dtype="fp16", seed=2)
    yield replace(shared, values="exact_sums", law="skewed", layout="strided", bias=True, seed=3)
    yield replace(exact, law="all_to_one", ep="2:1", seed=4)
    yield replace(large, values="exact_sums", law="all_to_one", weight_on_input=True, seed=5)
    for number, activation in enumerate(cell.activations):
        yield replace(exact, activation=activation, law="all_to_one", seed=6 + number)
    yield replace(large, law="all_to_one", seed=10)
    yield replace(shared, law="unnormalised", seed=11)
    yield replace(small, law="all_to_one", values="block_scales", dtype="fp16", seed=12)
    yield replace(small, law="all_to_one", values="loud_quiet", bias=True, seed=13)
    yield replace(small, law="all_to_one", values="zero_blocks", seed=14)
    yield replace(small, law="all_to_one", values="subnormals", inter=144, seed=15)
    yield replace(small, law="all_to_one", values="same_sign", hidden=264, seed=16)
    yield replace(shared, values="outlier_channels", seed=18)
    yield replace(shared, law="skewed", values="bimodal_scales", seed=19)
    for tokens in (0, 1):
        yield replace(exact, tokens=tokens, seed=17)


def model_cases(target: Target) -> list[Case]:
    """The published models, one split each, as far as their weights fit here: on a CPU on the schemes of their
    checkpoints; on a GPU on every FP8 scheme of our kernels, at batch sizes from one token to a long prefill, and once
    with as many experts on the device as fit."""
    if target.device == "cpu":
        return seed_cases(CPU_WEIGHT_BYTES, tokens=(CPU_TOKENS,), every_split=False)
    published = seed_cases(GPU_WEIGHT_BYTES, tokens=(1,))
    smallest: dict[str, Case] = {}
    widest: dict[str, Case] = {}
    for case in published:
        name = str(case.model).partition(":")[0]
        smallest[name] = min(smallest.get(name, case), case, key=lambda case: case.weight_bytes)
        if case.weight_bytes <= WIDE_BYTES:
            widest[name] = max(widest.get(name, case), case, key=lambda case: case.local_experts)
    every = [
        replace(case, scheme=scheme, tokens=tokens)
        for case in smallest.values()
        for scheme in MODEL_SCHEMES
        for tokens in GPU_TOKENS
    ]
    return list(dict.fromkeys(every + [replace(case, tokens=WIDE_TOKENS) for case in widest.values()]))


def is_checkpoints(case: Case) -> bool:
    """Whether a model is published in a case's scheme."""
    return case.model is not None and case.scheme in model_and_split(case.model)[0].schemes


def checkpoint_cases(target: Target) -> list[Case]:
    """The published models in the schemes of their checkpoints, as far as every backend can hold some of each layer."""
    return [case for case in model_cases(target) if is_checkpoints(case) and case.weight_bytes <= CHECKPOINT_BYTES]
