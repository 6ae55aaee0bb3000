"""Hypothesis strategies over every call of the selector, odd and malformed ones too; they draw no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.selection import facts
from conformance.selection.axes import LIBRARIES, PARALLELS, SCHEMES
from conformance.selection.build import make_config, make_parallel
from conformance.selection.facts import KEYS
from conformance.selection.model import EVERY
from fp8moe import (
    PLATFORMS,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    GroupShape,
    Platform,
    QuantKey,
    RoutingMethodType,
    ScaleDesc,
)


class Call(NamedTuple):
    """A call, and its candidates as indices into ``predicates.BACKENDS`` (None: the registry's)."""

    config: FusedMoEConfig
    weight_key: QuantKey | None
    activation_key: QuantKey | None
    allow_vllm_cutlass: bool
    platform: Platform
    env: Mapping[str, str]
    order: Sequence[int] | None


INTEGERS = ("0", "1", "2", "-1", "-0", "+1", " 1 ", "01", "00", "1_0", "", " ", "x", "true", "0x1", "1.0", "1__0")
BOOLEANS = ("1", "1", "1", "0", "true", "TRUE", "True", " true ", " 1", "1\n", "", "yes", "2", "false")
CHOICES = ("throughput", "latency", "masked_gemm", "Latency", "latency ", "", "bogus")
READ_AS = {
    facts.FLASHINFER: INTEGERS,
    facts.FLASHINFER_BACKEND: CHOICES,
    facts.DEEP_GEMM: INTEGERS,
    facts.MOE_DEEP_GEMM: INTEGERS,
    facts.MARLIN: BOOLEANS,
    facts.AITER: BOOLEANS,
    facts.AITER_MOE: BOOLEANS,
}
NOT_READ = ("VLLM_USE_DEEP_GEMM_E8M0", "VLLM_BATCH_INVARIANT", "VLLM_ALL2ALL_BACKEND", "PATH")


def environments() -> SearchStrategy[dict[str, str]]:
    """Any of the variables, mostly with texts that mean something; in any order."""
    odd = st.text(max_size=4)
    read = {name: st.sampled_from(texts) | odd for name, texts in READ_AS.items()}
    optional = read | {name: st.sampled_from(("0", "1", "x")) for name in NOT_READ}
    drawn = st.fixed_dictionaries({}, optional=optional)
    # A few at a time: with all seven set, nearly every selection ends at FlashInfer.
    few = st.lists(st.sampled_from(sorted(read)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: read[name] for name in names})
    )
    return (few | drawn).flatmap(
        lambda env: st.permutations(list(env.items())).map(dict)  # equal mappings, other orders
    )


def platforms() -> SearchStrategy[Platform]:
    """Catalogue devices, and any kind, capability, architecture, toolkit and libraries together."""
    architectures = st.sampled_from(
        ("gfx90a", "gfx942", "gfx950", "gfx94", "gfx908", "gfx1030", "gfx1100", "gfx95x", "")
    )
    features = st.sampled_from(("", ":sramecc+:xnack-", ":xnack+"))
    libraries = st.frozensets(st.sampled_from((*LIBRARIES, "vllm_xpu_kernels", "vendors_own")))
    anything = st.builds(
        Platform,
        kind=st.sampled_from(("cuda", "cuda", "rocm", "xpu", "cpu", "tpu", "CUDA", "npu"))
        | st.text(min_size=1, max_size=5),
        capability=st.none()
        | st.tuples(st.integers(7, 13), st.integers(0, 9))
        | st.tuples(st.integers(0, 1000), st.integers(0, 9)),
        gcn_arch=st.none() | st.builds("{}{}".format, architectures, features),
        cuda_version=st.none() | st.tuples(st.integers(11, 13), st.integers(0, 12)),
        libraries=libraries,
    )
    known = st.sampled_from(sorted(PLATFORMS)).map(PLATFORMS.__getitem__)
    lacking = st.builds(replace, known, libraries=libraries)
    return known | lacking | anything


def parallels() -> SearchStrategy[FusedMoEParallelConfig]:
    """Legal sizes with any exchange name, expert load balancing and sequence parallelism, in any combination."""
    size = st.sampled_from((1, 1, 2, 8))
    exchange = st.sampled_from((*facts.EXCHANGES, *facts.EXCHANGES, "custom", "PPLX", ""))
    flags = {"exchange": exchange, "eplb": st.booleans(), "sequence_parallel": st.booleans()}
    with_ep = st.builds(make_parallel, pcp=size, dp=size, ep=size, use_ep=st.just(True), **flags)
    without_ep = st.builds(make_parallel, tp=size, pcp=size, dp=size, **flags)
    return st.sampled_from(sorted(PARALLELS)).map(PARALLELS.__getitem__) | with_ep | without_ep


def configs() -> SearchStrategy[FusedMoEConfig]:
    """Layers that differ in what selection looks at."""
    dtypes = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
    return st.builds(
        make_config,
        activation=st.sampled_from(("silu", *facts.ACTIVATIONS, "relu", "SILU", "")) | st.text(max_size=6),
        gated=st.sampled_from((True, True, False)),
        routing=st.sampled_from(RoutingMethodType),
        parallel=parallels(),
        in_dtype=dtypes,
        logits_dtype=st.none() | dtypes,
        lora=st.sampled_from((False,) * 9 + (True,)),
    )


def schemes() -> SearchStrategy[tuple[QuantKey | None, QuantKey | None]]:
    """Named schemes, any two named keys, and keys built anew: equal to a named one or to none."""
    extents = st.sampled_from((-1, 1, 16, 64, 128))
    scales = st.builds(
        ScaleDesc,
        st.sampled_from((torch.float32, torch.float8_e4m3fn)),
        st.booleans(),
        st.builds(GroupShape, extents, extents),
    )
    dtypes = st.sampled_from((torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.uint8))
    fresh = st.builds(QuantKey, dtypes, scales)
    keys = st.sampled_from(KEYS)
    rebuilt = st.sampled_from(sorted(SCHEMES)).map(SCHEMES.__getitem__).map(_rebuilt)
    return st.sampled_from(sorted(SCHEMES)).map(SCHEMES.__getitem__) | rebuilt | st.tuples(keys | fresh, keys | fresh)


def calls(own_candidates: bool = True) -> SearchStrategy[Call]:
    """Any call, now and then with candidates of its own."""
    orders = st.permutations(EVERY).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: order[:n]))
    in_order = st.frozensets(st.sampled_from(EVERY)).map(sorted)
    return st.builds(
        lambda config, keys, allow, platform, env, order: Call(config, keys[0], keys[1], allow, platform, env, order),
        configs(),
        schemes(),
        st.booleans(),
        platforms(),
        environments(),
        st.none() | st.none() | in_order | orders if own_candidates else st.none(),
    )


def _rebuilt(scheme: tuple[Any, Any]) -> tuple[QuantKey | None, QuantKey | None]:
    weight, activation = (None if key is None else _copy(key) for key in scheme)
    return weight, activation


def _copy(key: QuantKey) -> QuantKey:
    def scale(desc: ScaleDesc) -> ScaleDesc:
        return ScaleDesc(desc.dtype, desc.static, GroupShape(desc.group_shape.row, desc.group_shape.col))

    return QuantKey(key.dtype, scale(key.scale), None if key.scale2 is None else scale(key.scale2), key.symmetric)
