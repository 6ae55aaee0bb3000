"""Case ids and what they name: the grammar, the published models, the strategies."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import find, given, settings

from conformance.build import config_of, outline
from conformance.cases import KEYS, LAWS, SCHEME_NAMES, VALUES, Case, InvalidCase
from conformance.laws import LAWS as WRITTEN_LAWS
from conformance.models import MODELS, Model, Split, SplitError
from conformance.regimes import REGIMES
from conformance.strategies import cases, moe_configs, platforms, seed_cases
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.platforms import Platform
from fp8moe.schemes import SCHEMES

GOLDEN = Path(__file__).parents[1] / "data" / "golden_case_ids.txt"
SAFE = re.compile(r"v1:[A-Za-z0-9._=,:+-]+")
MIB = 1 << 20


def golden_lines() -> list[tuple[str, str]]:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return [(text, digest) for text, digest in lines]


def digest_of(case: Case) -> str:
    return hashlib.sha256(json.dumps(outline(case), sort_keys=True).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("text", "digest"), golden_lines(), ids=[text for text, _ in golden_lines()])
def test_golden_id(text: str, digest: str) -> None:
    case = Case.parse(text)
    assert str(case) == text
    assert digest_of(case) == digest, (
        f"{text} no longer means what it meant: {outline(case)}. A published id keeps its meaning; "
        f"a new meaning takes a new field or a new version. (Now {digest_of(case)}.)"
    )


def test_golden_ids_cover_the_grammar() -> None:
    golden = [Case.parse(text) for text, _ in golden_lines()]
    assert len(golden) >= 25
    assert {case.scheme for case in golden} == set(SCHEME_NAMES)
    assert {case.law for case in golden} == set(LAWS)
    assert {case.values for case in golden} == set(VALUES)
    assert {str(case.model).partition(":")[0] for case in golden if case.model} == set(MODELS)
    for name in KEYS:
        assert any(getattr(case, name) != getattr(Case(), name) for case in golden), name


def test_a_golden_digest_notices_a_change_of_meaning() -> None:
    digests = [digest_of(Case.parse(text)) for text in ("v1:M=16", "v1:M=17", "v1:k=1,M=16", "v1:M=16,scheme=none")]
    assert len(set(digests)) == len(digests)


def test_the_vocabulary_is_what_is_written() -> None:
    assert tuple(name for name in SCHEMES if name != "nvfp4") == SCHEME_NAMES
    assert tuple(WRITTEN_LAWS) == LAWS
    assert tuple(REGIMES) == VALUES
    assert list(KEYS) == [field.name for field in fields(Case)]


@settings(max_examples=300, deadline=None)
@given(cases(small=False, fnuz=True))
def test_ids_round_trip(case: Case) -> None:
    text = str(case)
    assert Case.parse(text) == case
    assert SAFE.fullmatch(text)
    assert "::" not in text
    version, _, body = text.partition(":")
    backwards = ",".join(reversed(body.split(",")))
    assert str(Case.parse(f"{version}:{backwards}")) == text


def test_defaults_are_omitted_but_m() -> None:
    assert str(Case()) == "v1:M=16"
    assert Case.parse("v1:") == Case()
    assert Case.parse("v1:seed=7,law=skewed,M=33,scheme=block") == Case(tokens=33, law="skewed", seed=7)
    assert str(Case.parse("v1:seed=7,law=skewed,M=33,scheme=block")) == "v1:M=33,law=skewed,seed=7"


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("M=16", "id", "starts with 'v1'"),
        ("v2:M=16", "id", "starts with 'v1'"),
        ("v1:tokens=16", "id", "not 'tokens'"),
        ("v1:sede=1", "id", "did you mean seed?"),
        ("v1:M=1,", "id", "not ''"),
        ("v1:M", "tokens", "M=VALUE"),
        ("v1:M=", "tokens", "M=VALUE"),
        ("v1:M=1,M=1", "tokens", "M once"),
        ("v1:M=-1", "tokens", "an integer of at least 0"),
        ("v1:M=1.5", "tokens", "an integer of at least 0"),
        ("v1:M=\u0663", "tokens", "an integer of at least 0"),
        ("v1:E=0", "experts", "an integer of at least 1"),
        ("v1:k=9", "top_k", "at most experts=8"),
        ("v1:scheme=nvfp4", "scheme", "one of block"),
        ("v1:law=unifrom", "law", "did you mean uniform?"),
        ("v1:values=normal", "values", "one of iid"),
        ("v1:act=relu", "activation", "one of silu"),
        ("v1:dtype=fp32", "dtype", "one of bf16, fp16"),
        ("v1:layout=row", "layout", "contiguous, strided"),
        ("v1:bias=1", "bias", "on or off"),
        ("v1:ep=4", "ep", "size:rank"),
        ("v1:ep=4:4", "ep", "0 <= rank < size"),
        ("v1:ep=3:0", "ep", "divides experts=8"),
        ("v1:on_input=on", "weight_on_input", "top_k=1"),
        ("v1:fnuz=on,scheme=none", "fnuz", "scheme=none"),
        ("v1:law=repeated,k=1", "law", "top_k of at least 2"),
        ("v1:law=empty,k=6", "law", "at most half"),
        ("v1:seed=9223372036854775808", "seed", "less than 2^63"),
        ("v1:model=deepseek-v3", "model", "a split such as tp8"),
        ("v1:model=deepsek-v3:tp8", "model", "deepseek-v3?"),
        ("v1:model=deepseek-v3:tp7", "model", "divides I=2048"),
        ("v1:model=deepseek-v3:ep7", "model", "divides E=256"),
        ("v1:model=deepseek-v3:ep8r8", "model", "a rank below 8"),
        ("v1:model=deepseek-v3:tp8,E=8", "experts", "model=deepseek-v3:tp8 gives it"),
        ("v1:model=deepseek-v3:ep8,ep=4:0", "ep", "gives it"),
    ],
)
def test_errors_name_field_value_and_fix(text: str, field: str, said: str) -> None:
    with pytest.raises(InvalidCase) as caught:
        Case.parse(text)
    assert caught.value.field == field
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tokens": -1}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": 1.0}, "tokens"),
        ({"bias": 1}, "bias"),
        ({"scheme": None}, "scheme"),
        ({"scheme": ["block"]}, "scheme"),
        ({"ep": (4, 1)}, "ep"),
        ({"model": 3}, "model"),
    ],
)
def test_the_constructor_checks_types(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidCase) as caught:
        Case(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_spellings_of_one_thing_are_one_case() -> None:
    assert Case(ep="4/1") == Case(ep="4:1")
    assert Case(ep="1:0") == Case()
    assert Case(model="deepseek-v3:ep64r0") == Case(model="deepseek-v3:ep64")
    assert Case(model="deepseek-v3:ep64", experts=256, ep="64:0") == Case(model="deepseek-v3:ep64")


def test_a_model_supplies_the_sizes_and_leaves_them_behind() -> None:
    case = Case(model="qwen3-235b-a22b:ep8r3", tokens=5)
    assert (case.experts, case.top_k, case.hidden, case.inter, case.ep) == (128, 8, 4096, 1536, "8:3")
    assert (case.local_experts, case.weight_bytes) == (16, 16 * 3 * 4096 * 1536)
    assert str(case) == "v1:model=qwen3-235b-a22b:ep8r3,M=5"
    plain = replace(case, model=None)
    assert str(plain) == "v1:E=128,k=8,H=4096,I=1536,M=5,ep=8:3"
    with pytest.raises(InvalidCase, match="leave experts out"):
        replace(case, experts=8)


def test_ids_need_no_torch() -> None:
    code = (
        "import sys, conformance.cases, conformance.models, conformance.strategies as s\n"
        "print(conformance.cases.Case.parse('v1:model=deepseek-v3:ep64,M=3'), len(s.seed_cases(1 << 27)))\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_divide_as_they_say(model: Model) -> None:
    assert set(model.schemes) <= set(SCHEME_NAMES)
    for text in model.splits:
        split = Split.parse(text)
        config = model.config(text)
        assert str(split) == text
        assert config.num_experts == model.experts
        assert config.num_local_experts * split.ep_size == model.experts
        assert config.intermediate_size_per_partition * split.tp_size == model.inter
        assert (config.ep_size, config.use_ep) == (split.ep_size, split.ep_size > 1)
        case = Case(model=f"{model.name}:{text}")
        if split.kind != "dp":
            assert config_of(case) == config
        # A block checkpoint can be loaded only where whole blocks land on every device (specification section 4).
        assert model.schemes[0] != "block" or config.intermediate_size_per_partition % 128 == 0
    with pytest.raises(SplitError):
        model.config("tp13")


def test_data_parallel_splits_exchange_tokens() -> None:
    model = MODELS["deepseek-v3"]
    config = model.config("dp16r2", all2all_backend="deepep_low_latency")
    assert (config.dp_size, config.ep_size, config.ep_rank, config.num_local_experts) == (16, 16, 2, 16)
    assert config.moe_parallel_config.activation_format is FusedMoEActivationFormat.BatchedExperts
    assert not model.config("ep16").moe_parallel_config.use_all2all_kernels


def test_strategies_shrink_to_the_default() -> None:
    assert find(cases(small=False, fnuz=True), lambda case: True) == Case()
    assert find(cases(), lambda case: case.values == "same_sign") == Case(values="same_sign")
    assert find(cases("channel_tok"), lambda case: case.layout == "strided") == Case(
        scheme="channel_tok", layout="strided"
    )


@settings(max_examples=200, deadline=None)
@given(cases(small=False, activations=("gelu", "silu_no_mul"), dtypes=("fp16",), multiple_of=64, max_bytes=MIB))
def test_strategies_keep_to_what_they_are_given(case: Case) -> None:
    assert case.activation in ("gelu", "silu_no_mul")
    assert (case.dtype, case.fnuz) == ("fp16", False)
    assert case.hidden % 64 == case.inter % 64 == 0
    assert case.weight_bytes <= max(MIB, 2 * case.local_experts * 3 * 128 * 128)


def test_published_models_fit_the_budget() -> None:
    small, large = seed_cases(128 * MIB), seed_cases(3072 * MIB)
    assert all(case.weight_bytes <= 128 * MIB for case in small)
    assert set(small) < set(large)
    for found in (small, large):
        assert {str(case.model).partition(":")[0] for case in found} == set(MODELS)
    splits = {f"{model.name}:{split}" for model in MODELS.values() for split in model.splits if split[:2] != "dp"}
    assert {case.model for case in large} == splits
    assert all(case.weight_on_input == MODELS[str(case.model).partition(":")[0]].weight_on_input for case in large)
    fewest = seed_cases(128 * MIB, every_split=False, schemes=("block",), tokens=(1, 33))
    assert len(fewest) == 2 * len({(case.model, case.scheme) for case in fewest})
    assert {case.scheme for case in fewest} == {"block"}


@settings(max_examples=50, deadline=None)
@given(moe_configs(), platforms(("cuda", "cpu")))
def test_what_selection_takes_can_be_drawn(config: FusedMoEConfig, platform: Platform) -> None:
    assert config.num_experts == config.num_local_experts * config.ep_size
    assert platform.kind in ("cuda", "cpu")
