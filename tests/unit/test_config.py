"""The configuration: exactly what its constructors refuse, what follows from its fields, and that it is a value."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8moe
from fp8moe.config import (
    ACTIVATIONS,
    ALL2ALL_BACKENDS,
    GATED_ACTIVATIONS,
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

PARALLEL = {
    "tp_size": 1,
    "pcp_size": 1,
    "dp_size": 1,
    "ep_size": 1,
    "tp_rank": 0,
    "pcp_rank": 0,
    "dp_rank": 0,
    "ep_rank": 0,
    "use_ep": False,
    "all2all_backend": "naive",
    "enable_eplb": False,
    "is_sequence_parallel": False,
}
LAYER: dict[str, Any] = {
    "num_experts": 8,
    "experts_per_token": 2,
    "hidden_dim": 256,
    "intermediate_size_per_partition": 128,
    "num_local_experts": 8,
    "activation": "silu",
    "device": "cpu",
    "routing_method": RoutingMethodType.Renormalize,
    "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
    "in_dtype": torch.bfloat16,
}


def parallel(**fields: Any) -> FusedMoEParallelConfig:
    return FusedMoEParallelConfig(**PARALLEL | fields)


def layer(**fields: Any) -> FusedMoEConfig:
    return FusedMoEConfig(**LAYER | fields)


# -- fields, order, defaults: the specification's sections 3.1 and 3.2 --


def test_fields_and_their_order() -> None:
    names = [field.name for field in dataclasses.fields(FusedMoEConfig)]
    assert names == [
        *LAYER,
        "router_logits_dtype",
        "max_num_tokens",
        "has_bias",
        "is_act_and_mul",
        "is_lora_enabled",
        "disable_inplace",
    ]
    assert [field.name for field in dataclasses.fields(FusedMoEParallelConfig)] == list(PARALLEL)


def test_defaults() -> None:
    config = layer()
    assert config.router_logits_dtype is torch.bfloat16
    assert config.max_num_tokens == 256 or "VLLM_MOE_DP_CHUNK_SIZE" in os.environ
    assert not config.has_bias
    assert config.is_act_and_mul
    assert not config.is_lora_enabled
    assert config.disable_inplace


@given(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_logits_dtype_falls_back_to_the_activations(dtype: torch.dtype) -> None:
    assert layer(in_dtype=dtype).router_logits_dtype is dtype
    assert layer(in_dtype=dtype, router_logits_dtype=torch.float32).router_logits_dtype is torch.float32


@pytest.mark.parametrize(("text", "expected"), [("512", "512"), ("0", None), ("x", None), ("", None), ("-1", None)])
def test_default_number_of_tokens_is_read_at_import(text: str, expected: str | None) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(fp8moe.__file__).parents[1])!r})\n"
    code += "from fp8moe.config import DEFAULT_MAX_NUM_TOKENS as n; print(n)"
    env = os.environ | {"VLLM_MOE_DP_CHUNK_SIZE": text}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if expected is not None:
        assert done.stdout.strip() == expected
    else:
        assert f"VLLM_MOE_DP_CHUNK_SIZE={text!r}: expected a positive integer" in done.stderr


def test_enums() -> None:
    assert [method.value for method in RoutingMethodType] == list(range(9))
    names = "Default Renormalize DeepSeekV3 Llama4 RenormalizeNaive TopK Custom Simulated Unspecified"
    assert [method.name for method in RoutingMethodType] == names.split()
    assert FusedMoEActivationFormat.Standard.value == ("standard",)
    assert FusedMoEActivationFormat.BatchedExperts.value == ("batched_experts",)


# -- refusals: these, and nothing else --

SIZES = ("num_experts", "experts_per_token", "hidden_dim", "intermediate_size_per_partition", "num_local_experts")


@pytest.mark.parametrize("field", [*SIZES, "max_num_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_layers_sizes_are_at_least_1(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"FusedMoEConfig\.{field}={value}: expected .* at least 1"):
        layer(**{field: value})


@pytest.mark.parametrize("field", ["num_local_experts", "experts_per_token"])
def test_no_more_than_there_are_experts(field: str) -> None:
    layer(**{field: 8})
    with pytest.raises(ValueError, match=rf"FusedMoEConfig\.{field}=9: expected at most num_experts=8"):
        layer(**{field: 9})


@pytest.mark.parametrize("kind", ["tp", "pcp", "dp", "ep"])
@pytest.mark.parametrize("size", [0, -1])
def test_parallel_sizes_are_at_least_1(kind: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"FusedMoEParallelConfig\.{kind}_size={size}: expected .* at least 1"):
        parallel(**{f"{kind}_size": size, "use_ep": kind == "ep"})


@pytest.mark.parametrize("kind", ["tp", "pcp", "dp", "ep"])
@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_is_within_its_size(kind: str, rank: int) -> None:
    parallel(**{f"{kind}_size": 4, f"{kind}_rank": 3, "use_ep": kind == "ep"})
    with pytest.raises(ValueError, match=rf"{kind}_rank={rank}: expected 0 <= {kind}_rank < {kind}_size=4"):
        parallel(**{f"{kind}_size": 4, f"{kind}_rank": rank, "use_ep": kind == "ep"})


def test_expert_parallelism_excludes_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match=r"tp_size=2: expected 1 with use_ep=True"):
        parallel(tp_size=2, use_ep=True)
    with pytest.raises(ValueError, match=r"ep_size=2: expected 1 with use_ep=False"):
        parallel(ep_size=2)


@given(st.data())
def test_nothing_else_is_refused(data: st.DataObject) -> None:
    """Sequence parallelism, EPLB, names and dtypes raise in no combination; the counts only as listed above."""
    use_ep = data.draw(st.booleans())
    sizes = {kind: data.draw(st.integers(1, 64)) for kind in ("pcp", "dp")}
    sizes |= {
        "tp": 1 if use_ep else data.draw(st.integers(1, 64)),
        "ep": data.draw(st.integers(1, 64)) if use_ep else 1,
    }
    fields: dict[str, Any] = {f"{kind}_size": size for kind, size in sizes.items()}
    fields |= {f"{kind}_rank": data.draw(st.integers(0, size - 1)) for kind, size in sizes.items()}
    fields |= {name: data.draw(st.booleans()) for name in ("enable_eplb", "is_sequence_parallel")}
    made = parallel(use_ep=use_ep, all2all_backend=data.draw(st.sampled_from((*ALL2ALL_BACKENDS, "other"))), **fields)
    experts = data.draw(st.integers(1, 512))
    layer(
        num_experts=experts,
        experts_per_token=data.draw(st.integers(1, experts)),
        num_local_experts=data.draw(st.integers(1, experts)),
        hidden_dim=data.draw(st.integers(1, 1 << 20)),
        intermediate_size_per_partition=data.draw(st.integers(1, 1 << 20)),
        max_num_tokens=data.draw(st.integers(1, 1 << 20)),
        activation=data.draw(st.sampled_from((*ACTIVATIONS, "tanh", ""))),
        routing_method=data.draw(st.sampled_from(RoutingMethodType)),
        moe_parallel_config=made,
        in_dtype=data.draw(st.sampled_from((torch.bfloat16, torch.float32, torch.int8))),
        is_act_and_mul=data.draw(st.booleans()),
        is_lora_enabled=data.draw(st.booleans()),
    )


# -- the parallel factory: the specification's section 3.2 --


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 1, 1, False), (2, 1, 1)),
        ((1, 1, 2, False), (2, 2, 1)),
        ((2, 1, 2, False), (4, 2, 1)),
        ((2, 1, 1, True), (1, 1, 2)),
        ((1, 1, 2, True), (1, 2, 2)),
        ((2, 1, 2, True), (1, 2, 4)),
        ((1, 1, 1, True), (1, 1, 1)),
        ((2, 2, 2, True), (1, 2, 8)),
        ((2, 2, 2, False), (8, 2, 1)),
    ],
)
def test_factory_examples(sizes: tuple[int, int, int, bool], expected: tuple[int, int, int]) -> None:
    tp, pcp, dp, ep = sizes
    made = FusedMoEParallelConfig.make(tp_size=tp, pcp_size=pcp, dp_size=dp, enable_expert_parallel=ep)
    assert (made.tp_size, made.dp_size, made.ep_size) == expected
    assert made.pcp_size == pcp
    assert made.use_ep is (ep and tp * pcp * dp > 1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_factory_numbers_every_rank_once(tp: int, pcp: int, dp: int, ep: bool) -> None:
    ranks = [
        FusedMoEParallelConfig.make(
            tp_size=tp, pcp_size=pcp, dp_size=dp, tp_rank=t, pcp_rank=p, dp_rank=d, enable_expert_parallel=ep
        )
        for d in range(dp)
        for p in range(pcp)
        for t in range(tp)
    ]
    flat = [made.ep_rank if made.use_ep else made.tp_rank for made in ranks]
    assert flat == list(range(tp * pcp * dp))
    assert all(
        (made.dp_rank, made.pcp_rank) == (flat // (pcp * tp), flat // tp % pcp) for flat, made in enumerate(ranks)
    )


def test_factory_ignores_the_rank_of_a_group_of_one() -> None:
    made = FusedMoEParallelConfig.make(tp_rank=3, pcp_rank=3, dp_rank=3)
    assert (made.tp_rank, made.pcp_rank, made.dp_rank, made.ep_rank) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["tp", "pcp", "dp"])
def test_factory_names_what_it_was_given(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}_size=0"):
        FusedMoEParallelConfig.make(**{f"{kind}_size": 0})  # type: ignore[arg-type]
    sizes: dict[str, Any] = {"tp_size": 2, "pcp_size": 2, "dp_size": 2}
    for rank in (-1, 2):  # within the flat size, and another device's number
        with pytest.raises(ValueError, match=f"{kind}_rank"):
            FusedMoEParallelConfig.make(**sizes, **{f"{kind}_rank": rank})


@pytest.mark.parametrize("backend", ALL2ALL_BACKENDS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("ep", [False, True])
def test_factory_derives_sequence_parallelism(backend: str, tp: int, dp: int, ep: bool) -> None:
    made = FusedMoEParallelConfig.make(tp_size=tp, dp_size=dp, enable_expert_parallel=ep, all2all_backend=backend)
    able = backend in (
        "allgather_reducescatter",
        "naive",
        "deepep_high_throughput",
        "deepep_low_latency",
        "mori",
    )
    assert made.is_sequence_parallel is (able and ep and tp > 1 and dp > 1)


def test_factory_takes_sequence_parallelism_as_given() -> None:
    assert FusedMoEParallelConfig.make(is_sequence_parallel=True).is_sequence_parallel
    options: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_expert_parallel": True}
    assert not FusedMoEParallelConfig.make(**options, is_sequence_parallel=False).is_sequence_parallel
    assert not FusedMoEParallelConfig.make(**options, engine_tp_size=1).is_sequence_parallel


def test_no_parallel() -> None:
    made = FusedMoEParallelConfig.make_no_parallel()
    assert made == parallel()
    assert FusedMoEParallelConfig.make().all2all_backend == "allgather_reducescatter"


# -- derived properties --

USE = {
    "pplx": "use_pplx_kernels",
    "deepep_high_throughput": "use_deepep_ht_kernels",
    "deepep_low_latency": "use_deepep_ll_kernels",
    "mori": "use_mori_kernels",
    "naive": "use_naive_all2all_kernels",
    "allgather_reducescatter": "use_naive_all2all_kernels",
    "flashinfer_all2allv": "use_fi_all2allv_kernels",
}


@pytest.mark.parametrize("backend", [*ALL2ALL_BACKENDS, "other"])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("pcp", [1, 2])
def test_which_kernels_exchange_tokens(backend: str, dp: int, ep: bool, pcp: int) -> None:
    made = parallel(dp_size=dp, pcp_size=pcp, use_ep=ep, ep_size=2 if ep else 1, all2all_backend=backend)
    exchanges = dp > 1 and ep
    assert made.use_all2all_kernels is exchanges
    for name in set(USE.values()):
        assert getattr(made, name) is (exchanges and USE.get(backend) == name), name
    batched = exchanges and backend in ("pplx", "deepep_low_latency")
    assert made.use_batched_activation_format is batched
    layout = FusedMoEActivationFormat.BatchedExperts if batched else FusedMoEActivationFormat.Standard
    assert made.activation_format is layout


def test_a_layer_passes_its_parallel_part_through() -> None:
    made = FusedMoEParallelConfig.make(
        tp_size=2, pcp_size=2, dp_size=2, tp_rank=1, dp_rank=1, enable_expert_parallel=True, all2all_backend="mori"
    )
    config = layer(moe_parallel_config=made)
    names = [f"{kind}_{what}" for kind in ("tp", "dp", "pcp", "ep") for what in ("size", "rank")]
    names += ["use_ep", "use_pplx_kernels", "use_deepep_ht_kernels", "use_deepep_ll_kernels", "use_mori_kernels"]
    for name in [*names, "use_fi_all2allv_kernels", "use_naive_all2all_kernels"]:
        assert getattr(config, name) == getattr(made, name), name


def test_gating_is_not_tied_to_the_activation() -> None:
    for activation in ACTIVATIONS:
        for gated in (True, False):
            assert layer(activation=activation, is_act_and_mul=gated).is_act_and_mul is gated
    assert GATED_ACTIVATIONS == ("silu", "gelu", "swigluoai", "swiglustep")


# -- a configuration is a value --


@pytest.mark.parametrize("make", [parallel, layer])
def test_equal_by_value_and_hashed_once(make: Any) -> None:
    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert hash(one) == hash(one)
    assert len({one, other}) == 1


def test_every_field_counts() -> None:
    changed = {
        "num_experts": 9,
        "experts_per_token": 3,
        "hidden_dim": 512,
        "intermediate_size_per_partition": 256,
        "num_local_experts": 4,
        "activation": "gelu",
        "device": "cuda",
        "routing_method": RoutingMethodType.Default,
        "moe_parallel_config": parallel(enable_eplb=True),
        "in_dtype": torch.float16,
        "router_logits_dtype": torch.float32,
        "max_num_tokens": 17,
        "has_bias": True,
        "is_act_and_mul": False,
        "is_lora_enabled": True,
        "disable_inplace": False,
    }
    assert set(changed) == {field.name for field in dataclasses.fields(FusedMoEConfig)}
    for name, value in changed.items():
        assert layer(**{name: value}) != layer(), name
        assert dataclasses.replace(layer(), **{name: value}) == layer(**{name: value}) or name == "in_dtype"


@pytest.mark.parametrize("make", [parallel, layer])
def test_frozen_copied_pickled(make: Any) -> None:
    one = make()
    hash(one)
    if isinstance(one, FusedMoEConfig):
        assert one.facets is layer().facets  # interned
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.tp_size = 2
    for twin in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one
        assert hash(twin) == hash(one)
    state = pickle.dumps(one)
    assert b"_hash" not in state  # texts hash otherwise in another process
    assert b"_facets" not in state


def test_facets_hold_what_selection_reads() -> None:
    config = layer(hidden_dim=512, num_local_experts=4, has_bias=True)
    assert config.facets is layer().facets
    for name, value in (
        ("activation", "gelu"),
        ("is_act_and_mul", False),
        ("is_lora_enabled", True),
        ("routing_method", RoutingMethodType.Default),
        ("router_logits_dtype", torch.float32),
        ("moe_parallel_config", parallel(enable_eplb=True)),
    ):
        assert layer(**{name: value}).facets is not config.facets, name
