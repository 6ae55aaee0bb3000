"""Hypothesis strategies: cases, and what selection takes. They draw configurations, never tensors.

Every choice has the default case's value first, which is what Hypothesis shrinks to. Nothing here imports torch until a
configuration is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from conformance.cases import DTYPES, LAWS, SCHEME_NAMES, VALUES, Case, InvalidCase
from conformance.models import MODELS, Split
from fp8moe.config import (
    ACTIVATIONS,
    ALL2ALL_BACKENDS,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform

if TYPE_CHECKING:
    import torch

SMALL_TOKENS = (16, 1, 2, 0, 3, 15, 17, 31, 33, 48, 63, 64, 65)
LARGE_TOKENS = (*SMALL_TOKENS, 127, 128, 129, 130, 255, 257, 512, 1000)
SMALL_EXPERTS = (8, 4, 2, 1, 3, 5, 6, 16)
LARGE_EXPERTS = (*SMALL_EXPERTS, 32, 36, 60, 64, 128, 256, 513)
TOP_K = (2, 1, 3, 4, 6, 8)
PLACEMENTS = (*(None,) * 9, "2:1", "2:0", "4:3", "4:2", "8:7", "3:1", "8:0")
SMALL_SIZES = (256, 128, 384, 512, 144, 72, 200, 272, 320, 136)
LARGE_SIZES = (*SMALL_SIZES, 640, 768, 1000, 1024, 1536, 2048)
SMALL_BYTES = 8 << 20
LARGE_BYTES = 256 << 20
LARGEST_SEED = 999_999

SEED_VALUES = ("iid", "block_scales", "outlier_channels")
MORE_TOKENS_WITH_EP = 4
"""A rank sees few of a batch's token-expert pairs, so it gets a larger batch."""


@st.composite
def cases(
    draw: st.DrawFn,
    scheme: str | None = None,
    *,
    schemes: Sequence[str] = SCHEME_NAMES,
    activations: Sequence[str] = ACTIVATIONS,
    dtypes: Sequence[str] = DTYPES,
    laws: Sequence[str] = LAWS,
    values: Sequence[str] = VALUES,
    small: bool = True,
    max_bytes: int | None = None,
    multiple_of: int = 8,
    expert_parallel: bool = True,
    bias: bool = True,
    weight_on_input: bool = True,
    fnuz: bool = False,
    strided: bool = True,
) -> Case:
    """Cases of what a backend takes.

    Args:
        scheme: this one alone; None: any of `schemes`.
        small: sizes for a CPU or Triton's interpreter; else up to 1,000 tokens, 513 experts, H and I of 2,048.
        max_bytes: of a case's weights; None: 8 MiB where small, else 256 MiB.
        multiple_of: that H and I are multiples of, 8 at the least.
        expert_parallel, bias, weight_on_input, fnuz, strided: whether such cases are drawn.
    """
    # Every case makes the same choices, whatever came before, so that one of them can shrink without shifting the
    # others; what does not fit together is put right afterwards.
    activation = draw(st.sampled_from(activations))
    scheme = scheme or draw(st.sampled_from(schemes))
    experts = draw(st.sampled_from(SMALL_EXPERTS if small else LARGE_EXPERTS))
    top_k = min(draw(st.sampled_from(TOP_K)), experts)
    sizes = [size for size in (SMALL_SIZES if small else LARGE_SIZES) if size % multiple_of == 0]
    hidden, inter = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    law = draw(st.sampled_from(laws))
    ep = draw(st.sampled_from(PLACEMENTS))
    case = Case(
        experts=experts,
        top_k=top_k,
        tokens=draw(st.sampled_from(SMALL_TOKENS if small else LARGE_TOKENS)),
        scheme=scheme,
        dtype=draw(st.sampled_from(dtypes)),
        activation=activation,
        law=law if _has_law(experts, top_k, law) else next(law for law in laws if _has_law(experts, top_k, law)),
        values=draw(st.sampled_from(values)),
        ep=ep if expert_parallel and ep is not None and experts % int(ep[0]) == 0 else None,
        bias=draw(st.booleans()) and bias,
        weight_on_input=draw(st.booleans()) and weight_on_input and top_k == 1,
        fnuz=draw(st.booleans()) and fnuz and scheme != "none",
        layout="strided" if draw(st.booleans()) and strided else "contiguous",
        seed=draw(st.integers(0, LARGEST_SEED)),
    )
    least, limit = min(sizes), max_bytes or (SMALL_BYTES if small else LARGE_BYTES)
    for height, width in ((hidden, inter), (hidden, least), (least, least)):
        case = replace(case, hidden=height, inter=width)
        if case.weight_bytes <= limit:
            break
    return case


def seed_cases(
    max_bytes: int,
    *,
    models: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tokens: Sequence[int] = (33,),
    every_split: bool = True,
) -> list[Case]:
    """The published models, with their own routing, at each split whose weights on one device fit into `max_bytes`.

    A small budget leaves the wide splits, with few experts or narrow ones: 128 MiB has every model, 3 GiB every split.
    Data-parallel splits are left out: their tensors are those of "ep".

    Args:
        models, schemes: only these; None: all, with the schemes of each model's checkpoints.
        tokens: M without expert parallelism; four times as many with it.
        every_split: False: of each model and scheme only the split with the fewest bytes.
    """
    wanted: dict[tuple[str, str], list[Case]] = {}
    for case in _published():
        name = str(case.model).partition(":")[0]
        fits = case.weight_bytes <= max_bytes and (models is None or name in models)
        if fits and (schemes is None or case.scheme in schemes):
            wanted.setdefault((name, case.scheme), []).append(case)
    found = []
    for alike in wanted.values():
        alike.sort(key=lambda case: case.weight_bytes)
        for case in alike if every_split else alike[:1]:
            more = MORE_TOKENS_WITH_EP if case.ep else 1
            found += [replace(case, tokens=more * count) for count in tokens]
    return found


def _published() -> list[Case]:
    """One case for each model, scheme and split; its values and seed go by its place, so they are always the same."""
    found: list[Case] = []
    for model in MODELS.values():
        for scheme in model.schemes:
            for split in model.splits:
                if Split.parse(split).kind == "dp":
                    continue
                case = Case(
                    model=f"{model.name}:{split}",
                    scheme=scheme,
                    activation=model.activation,
                    law="router",
                    values=SEED_VALUES[len(found) % len(SEED_VALUES)],
                    weight_on_input=model.weight_on_input,
                    seed=len(found),
                )
                found.append(case)
    return found


def _has_law(experts: int, top_k: int, law: str) -> bool:
    try:
        Case(experts=experts, top_k=top_k, law=law)
    except InvalidCase:
        return False
    return True


def platforms(kinds: Sequence[str] | None = None) -> st.SearchStrategy[Platform]:
    """Devices of the catalogue, with any of the libraries there."""
    known = [platform for platform in PLATFORMS.values() if kinds is None or platform.kind in kinds]
    return st.builds(
        lambda platform, libraries: platform.with_libraries(*libraries),
        st.sampled_from(known),
        st.sets(st.sampled_from(LIBRARIES)),
    )


def parallel_configs() -> st.SearchStrategy[FusedMoEParallelConfig]:
    """Through the factory, as layers get them."""
    sizes = st.sampled_from((1, 2, 4, 8))
    return st.builds(
        FusedMoEParallelConfig.make,
        tp_size=sizes,
        pcp_size=st.sampled_from((1, 2)),
        dp_size=sizes,
        enable_expert_parallel=st.booleans(),
        all2all_backend=st.sampled_from(ALL2ALL_BACKENDS),
        enable_eplb=st.booleans(),
    )


@st.composite
def moe_configs(draw: st.DrawFn) -> FusedMoEConfig:
    """Layers as the selector meets them: any activation, gated or not, any routing method and logits, LoRA."""
    import torch

    parallel = draw(parallel_configs())
    local = draw(st.sampled_from((8, 1, 4, 32)))
    experts = local * parallel.ep_size
    logits: torch.dtype | None = draw(st.sampled_from((None, torch.bfloat16, torch.float32)))
    return FusedMoEConfig(
        num_experts=experts,
        experts_per_token=draw(st.integers(1, min(experts, 8))),
        hidden_dim=draw(st.sampled_from((256, 128, 2048, 7168, 200))),
        intermediate_size_per_partition=draw(st.sampled_from((256, 128, 768, 2048, 72))),
        num_local_experts=local,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        device="cpu",
        routing_method=draw(st.sampled_from(list(RoutingMethodType))),
        moe_parallel_config=parallel,
        in_dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        router_logits_dtype=logits,
        max_num_tokens=256,
        has_bias=draw(st.booleans()),
        is_act_and_mul=draw(st.booleans()),
        is_lora_enabled=draw(st.booleans()),
    )
