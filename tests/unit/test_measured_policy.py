"""The measured policy over any call and table: only what the selector accepts, and the seed's order otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.selection.agreement import arguments
from conformance.selection.ask import ELEVEN
from conformance.selection.axes import PARALLELS
from conformance.selection.build import SINGLE, make_config
from conformance.selection.draw import Call, calls
from conformance.selection.model import EVERY
from fp8moe import (
    PLATFORMS,
    Fp8MoeBackend,
    Platform,
    Reason,
    explain_fp8_moe_backend,
    select_fp8_moe_backend,
)
from fp8moe.config import ACTIVATIONS
from fp8moe.measured import (
    Certificate,
    Fallback,
    LayerShape,
    MeasuredDevice,
    MeasuredSelection,
    MeasuredTable,
    explain_measured,
    select_measured,
)
from fp8moe.measured.rows import FORMATS
from fp8moe.schemes import BLOCK, SCHEME_NAMES, SCHEMES
from tests.unit.measured_tables import DEVICES, LAYER, WITHOUT_FLASHINFER, log_time, rows_of, table_of

NAMES = tuple(spec.name for spec in ELEVEN)
LEVELS = ("certify", "certify", "certify", "certify", "smoke", "quick", "")
MANY = settings(max_examples=120, deadline=None)


class Asked(NamedTuple):
    """A call, a table, and a number of tokens."""

    call: Call
    table: MeasuredTable
    tokens: int


def shape_of(call: Call) -> LayerShape | None:
    """The call's layer where a table can hold it."""
    name = SCHEME_NAMES.get((call.weight_key, call.activation_key))
    config = call.config
    if name is None or config.activation not in ACTIVATIONS:
        return None
    layout = next(name for name, value in FORMATS.items() if value is config.facets.activation_format)
    sizes = (config.num_local_experts, config.experts_per_token, config.hidden_dim)
    return LayerShape(*sizes, config.intermediate_size_per_partition, name, config.activation, layout)


FORCED = (
    {"VLLM_USE_FLASHINFER_MOE_FP8": "1"},
    {"VLLM_USE_FLASHINFER_MOE_FP8": "1", "VLLM_FLASHINFER_MOE_BACKEND": "latency"},
    {"VLLM_USE_FLASHINFER_MOE_FP8": "1", "VLLM_FLASHINFER_MOE_BACKEND": "masked_gemm"},
    {"VLLM_USE_DEEP_GEMM": "1"},
    {"VLLM_TEST_FORCE_FP8_MARLIN": "1"},
    {"VLLM_ROCM_USE_AITER": "1"},
    {"VLLM_MOE_USE_DEEP_GEMM": "x"},
)
"""Variables that decide before the scan, or fail."""
SHORTENED: tuple[dict[str, str], ...] = (
    {},
    {},
    {"VLLM_USE_FLASHINFER_MOE_FP8": "0"},
    {"VLLM_USE_DEEP_GEMM": "0"},
    {"VLLM_MOE_USE_DEEP_GEMM": "0", "VLLM_ROCM_USE_AITER_MOE": "1"},
)
"""Variables that leave the scan, some with fewer candidates."""
TOKENS = (1, 8, 64, 512)


def plain_calls(envs: Sequence[dict[str, str]], lora: SearchStrategy[bool]) -> SearchStrategy[Call]:
    """Calls about devices of the catalogue, most of which some backend takes."""
    configs = st.builds(
        make_config,
        activation=st.just("silu") | st.sampled_from(("gelu", "swigluoai", "relu2_no_mul")),
        gated=st.sampled_from((True,) * 9 + (False,)),
        parallel=st.just(SINGLE) | st.sampled_from((*PARALLELS.values(),)),
        lora=lora,
    )
    schemes = st.just(BLOCK) | st.sampled_from((*SCHEMES.values(),))
    usual = (WITHOUT_FLASHINFER, PLATFORMS["h100"], PLATFORMS["b200"], PLATFORMS["l40s"])
    platforms = st.sampled_from(usual) | st.sampled_from(usual) | st.sampled_from((*PLATFORMS.values(),))
    orders = st.none() | st.permutations(EVERY)
    return st.builds(
        lambda config, keys, allow, platform, env, order: Call(config, *keys, allow, platform, env, order),
        *(configs, schemes, st.booleans(), platforms, st.sampled_from(envs), orders),
    )


@st.composite
def asked(draw: st.DrawFn, calls: SearchStrategy[Call] | None = None) -> Asked:
    """A call with a table: mostly of its device and layer, with times of any backends and any certificates.

    The table comes from a drawn seed: choices one by one are drawn alike too often, and then little is measured.
    """
    call = draw(plain_calls(SHORTENED, st.just(False)) if calls is None else calls)
    random = Random(draw(st.integers(0, 1 << 32)))
    shape = shape_of(call)
    if shape is None or random.random() < 0.1:
        shape = LAYER
    positional, keywords = arguments(call)
    verdicts = explain_fp8_moe_backend(*positional, **keywords).verdicts
    taken_out = (Reason.DISABLED_BY_ENV, Reason.NOT_ALLOWED)
    near = [v.backend.value for v in verdicts if v.supported or v.reason in taken_out]
    names = {random.choice(near if near and random.random() < 0.8 else NAMES) for _ in range(random.randint(1, 6))}
    times = {
        name: {
            tokens: random.choice((10.0, 20.0, random.uniform(1, 100), 10 ** random.uniform(-3, 9)))
            for tokens in random.sample(TOKENS, random.choice((1, 2, 3, 4, 4)))
        }
        for name in sorted(names)
    }
    levels = {name: random.choice(LEVELS) for name in NAMES}
    certificates = {name: Certificate(level, "2026-11-24", "0" * 64) for name, level in levels.items() if level}
    device = MeasuredDevice("a device", *device_of(call.platform)) if random.random() < 0.9 else DEVICES["h200"]
    tokens = random.choice((*TOKENS, random.randint(1, 64), random.randint(1, 600)))
    return Asked(call, table_of(rows_of(shape, times), (), device, **certificates), tokens)


def device_of(platform: Platform) -> tuple[str, str]:
    """Kind and architecture as a table may have them: a drawn kind can be all blanks, which no table holds."""
    return platform.kind.strip() or "blank", platform.architecture.strip() or "blank"


def keywords_of(one: Asked) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional, keywords = arguments(one.call)
    *question, allow = positional
    measured = {"tokens": one.tokens, "table": one.table, "allow_vllm_cutlass": allow}
    return tuple(question), keywords | measured


def measured(one: Asked) -> MeasuredSelection:
    question, keywords = keywords_of(one)
    return explain_measured(*question, **keywords)


def outcome(select: Callable[..., Any], *positional: Any, **keywords: Any) -> tuple[Any, ...]:
    """What a selector returns, or the type and text of what it raises."""
    try:
        return tuple(select(*positional, **keywords))
    except (ValueError, NotImplementedError) as error:
        return type(error), str(error)


def outcome_measured(one: Asked) -> tuple[Any, ...]:
    question, keywords = keywords_of(one)
    return outcome(select_measured, *question, **keywords)


def outcome_of_seed(call: Call) -> tuple[Any, ...]:
    positional, keywords = arguments(call)
    return outcome(select_fp8_moe_backend, *positional, **keywords)


def with_certificates(table: MeasuredTable, certificates: Mapping[str, Certificate]) -> MeasuredTable:
    return MeasuredTable(table.device, table.versions, table.rows, certificates, table.source)


def expected_pick(one: Asked) -> str | None:
    """The backend that measurement should choose, by going through the table row by row; None: it should not."""
    positional, keywords = arguments(one.call)
    seed = explain_fp8_moe_backend(*positional, **keywords)
    shape = shape_of(one.call)
    usual = shape is not None and shape.gated == one.call.config.is_act_and_mul
    if seed.rule != "R8" or not usual or one.table.device.differs(one.call.platform, None):
        return None
    best: tuple[float, int] | None = None
    for place, verdict in enumerate(seed.verdicts):
        name = verdict.backend.value
        certificate = one.table.certificates.get(name)
        if not verdict.supported or certificate is None or certificate.level != "certify":
            continue
        points = {row.tokens: row.us for row in one.table.rows if row.backend == name and row.shape == shape}
        time = log_time(points, one.tokens)
        if time is not None and (best is None or (time, place) < best):
            best = time, place
    return None if best is None else seed.verdicts[best[1]].backend.value


def judge(one: Asked) -> MeasuredSelection:
    """What must hold of every answer."""
    positional, keywords = arguments(one.call)
    answer, want = measured(one), expected_pick(one)
    seed = explain_fp8_moe_backend(*positional, **keywords)
    assert answer.why
    assert answer.seed == seed.backend
    told = (type(answer.error), str(answer.error)) if answer.error else (answer.backend, answer.experts_cls)
    assert outcome_measured(one) == told
    if want is None:
        assert answer.fallback is not None
        for part in ("backend", "experts_cls", "rule", "verdicts"):
            assert getattr(answer, part) == getattr(seed, part)
        assert outcome_measured(one) == outcome_of_seed(one.call)
    else:
        assert (answer.rule, answer.fallback, answer.error) == ("measured", None, None)
        assert answer.backend is not None
        assert answer.backend.value == want
        assert [verdict.supported for verdict in seed.verdicts if verdict.backend == answer.backend] == [True]
        for mine, seeds in zip(answer.verdicts, seed.verdicts, strict=True):
            assert (mine.backend, mine.supported, mine.reason, mine.detail) == (
                seeds.backend,
                seeds.supported,
                seeds.reason,
                seeds.detail,
            )
    return answer


@MANY
@given(asked())
def test_the_pick_is_the_fastest_certified_that_the_selector_accepts(one: Asked) -> None:
    judge(one)


@settings(max_examples=60, deadline=None)
@given(asked(calls()))
def test_odd_calls_too(one: Asked) -> None:
    judge(one)


@MANY
@given(asked())
def test_without_its_certificate_the_next_fastest_is_picked(one: Asked) -> None:
    seen = []
    while (answer := measured(one)).fallback is None:
        assert answer.backend is not None
        (time,) = [time.us for time in answer.times if time.backend == answer.backend]
        seen.append(time)
        left = {name: held for name, held in one.table.certificates.items() if name != answer.backend.value}
        one = one._replace(table=with_certificates(one.table, left))
    assert seen == sorted(seen, key=lambda us: us or 0.0)
    assert outcome_measured(one) == outcome_of_seed(one.call)


@MANY
@given(asked())
def test_an_empty_table_is_the_seeds_order(one: Asked) -> None:
    empty = MeasuredTable(one.table.device, one.table.versions)
    assert outcome_measured(one._replace(table=empty)) == outcome_of_seed(one.call)
    uncertified = with_certificates(one.table, {})
    assert outcome_measured(one._replace(table=uncertified)) == outcome_of_seed(one.call)


@MANY
@given(asked(plain_calls(FORCED, st.booleans())))
def test_rules_before_the_scan_win(one: Asked) -> None:
    answer = judge(one)
    assert answer.fallback is Fallback.RULE
    if one.call.config.is_lora_enabled:
        assert (answer.rule, answer.backend) == ("R1", Fp8MoeBackend.TRITON)
    else:
        assert answer.rule not in ("R8", "R9", "measured")


def test_the_strategy_reaches_the_measured_rule_and_every_fallback() -> None:
    reached: Counter[Fallback | None] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(asked())
    def collect(one: Asked) -> None:
        reached[measured(one).fallback] += 1

    collect()
    assert set(reached) == {None, *Fallback} - {Fallback.VERSIONS}, reached
    assert reached[None] > sum(reached.values()) // 8
