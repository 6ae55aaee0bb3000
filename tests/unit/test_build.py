"""Building a case: random numbers, shapes, the same bits everywhere, static scales, a rank's experts, judged tokens."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import conformance.draw
from conformance.build import ROW_GAP, CaseTensors, build, expert_map_of, judged_tokens, outline, routing
from conformance.cases import LAWS, SCHEME_NAMES, VALUES, Case
from conformance.draw import Draw
from conformance.strategies import cases, seed_cases
from fp8moe.activations import activate
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.scaling import dequantize
from fp8moe.validation import check_call, check_weights

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "data" / "golden_case_tensors.txt"
MASK = (1 << 64) - 1


def bits_of(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest_of(tensors: CaseTensors) -> str:
    """Over the bytes of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.named().items()):
        digest.update(name.encode() + bits_of(tensor))
    return digest.hexdigest()[:16]


def golden_lines() -> list[tuple[str, str]]:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return [(text, digest) for text, digest in lines]


def same_bits(one: CaseTensors, other: CaseTensors) -> bool:
    names = one.named()
    return names.keys() == other.named().keys() and all(bits_of(names[n]) == bits_of(other.named()[n]) for n in names)


@pytest.mark.parametrize(("text", "digest"), golden_lines(), ids=[text for text, _ in golden_lines()])
def test_golden_tensors(text: str, digest: str) -> None:
    assert digest_of(build(Case.parse(text))) == digest, (
        f"the tensors of {text} changed, and with them what every published id of its kind stands for"
    )


def test_golden_tensors_cover_laws_and_values() -> None:
    golden = [Case.parse(text) for text, _ in golden_lines()]
    assert {case.law for case in golden} == set(LAWS) - {"router"}  # whose last bit is torch's
    assert {case.values for case in golden} == set(VALUES)
    assert {case.scheme for case in golden} == set(SCHEME_NAMES)


def test_draws_are_splitmix64() -> None:
    key = int.from_bytes(hashlib.blake2b(b"5/name", digest_size=8).digest(), "little")
    expected = []
    for place in range(50):
        word = (key + place * 0x9E3779B97F4A7C15) & MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        expected.append(word ^ (word >> 31))
    assert [int(word) & MASK for word in Draw(5).words("name", 50)] == expected
    assert torch.equal(Draw(5).words("name", 30, 20), Draw(5).words("name", 50)[20:])


def test_draws_are_distributed_as_they_say() -> None:
    draw, shape = Draw(1), (300, 400)
    normal = draw.normal("normal", shape).double()
    assert abs(float(normal.mean())) < 0.01
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert 3 < float(normal.abs().max()) < 3.47
    uniform = draw.uniform("uniform", shape)
    assert 0 <= float(uniform.min()) < 0.001
    assert 0.999 < float(uniform.max()) < 1
    counts = torch.bincount(draw.integers("integers", shape, 12).flatten(), minlength=12)
    assert bool(((counts - 10_000).abs() < 600).all())
    exponents = torch.bincount(draw.binades("binades", shape, -2, 4).log2().floor().long().flatten() + 2)
    assert len(exponents) == 6
    assert bool(((exponents - 20_000).abs() < 900).all())
    assert sorted(draw.sign("sign", shape).unique().tolist()) == [-1.0, 1.0]
    assert draw.integers("all", (1000,), 1 << 31).max() > 1 << 30


def test_streams_are_independent() -> None:
    one, other = Draw(1).normal("one", (10_000,)), Draw(1).normal("other", (10_000,))
    assert abs(float((one * other).mean())) < 0.05
    assert abs(float((one * Draw(2).normal("one", (10_000,))).mean())) < 0.05


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(scheme="tensor_static", tokens=9)
    whole = build(case)
    monkeypatch.setitem(conformance.draw.CHUNK_WORDS, "cpu", 1000)
    assert same_bits(whole, build(case))


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
@pytest.mark.parametrize("sizes", [(256, 128), (200, 72)], ids=str)
def test_every_scheme_passes_validation(scheme: str, activation: str, sizes: tuple[int, int]) -> None:
    for case in (
        Case(scheme=scheme, activation=activation, hidden=sizes[0], inter=sizes[1], tokens=3, bias=True, dtype="fp16"),
        Case(scheme=scheme, activation=activation, hidden=sizes[0], inter=sizes[1], fnuz=scheme != "none", ep="2:1"),
    ):
        check(build(case))


def check(tensors: CaseTensors) -> None:
    """The checks that backends make, and that `outline` told what was built."""
    device = tensors.weights.w13.device
    check_weights(tensors.config, tensors.quant, tensors.weights)
    check_call(
        tensors.config,
        device,
        tensors.hidden_states,
        tensors.topk_weights,
        tensors.topk_ids,
        expert_map=tensors.expert_map,
        apply_router_weight_on_input=tensors.apply_router_weight_on_input,
    )
    told = outline(tensors.case)
    for name, tensor in tensors.named().items():
        assert told.pop(name) == f"{tensor.dtype} {tuple(tensor.shape)}", name
    assert not [text for text in told.values() if text.startswith("torch.") and text.endswith(")")]


@settings(max_examples=40, deadline=None)
@given(cases(fnuz=True, max_bytes=1 << 20))
def test_any_case_passes_validation_twice_the_same(case: Case) -> None:
    tensors = build(case)
    check(tensors)
    assert same_bits(tensors, build(Case.parse(str(case))))


def test_seeds_differ() -> None:
    one, other = build(Case()).named(), build(Case(seed=1)).named()
    for name in one:
        assert bits_of(one[name]) != bits_of(other[name]), name


def test_a_field_changes_only_what_it_is_about() -> None:
    plain = build(Case()).named()
    for change, kept in (
        ({"tokens": 40}, ("w13", "w2", "w13_scale", "w2_scale")),
        ({"law": "skewed"}, ("w13", "w2", "hidden_states")),
        ({"bias": True}, ("w13", "w2", "hidden_states", "topk_ids")),
    ):
        changed = build(replace(Case(), **change)).named()
        assert all(bits_of(changed[name]) == bits_of(plain[name]) for name in kept)


def reference(tensors: CaseTensors) -> Tensor:
    """(M, k, I) intermediates in float64, without any quantisation of activations."""
    w13 = dequantised(tensors.quant, tensors.weights.w13, tensors.weights.w13_scale, tensors.case.gated)
    values = tensors.hidden_states.double()[:, None, None] @ w13[tensors.topk_ids.long()].transpose(2, 3)
    return activate(tensors.case.activation, values[:, :, 0])


def dequantised(quant: FusedMoEQuantConfig, weight: Tensor, scale: Tensor | None, halves: bool) -> Tensor:
    if scale is None or quant.w1.shape is None:
        return weight.double()
    group = quant.w1.shape
    if not (group.is_block() and halves):
        return dequantize(weight, scale, group, dtype=torch.float64)
    parts = zip(weight.chunk(2, dim=1), scale.chunk(2, dim=1), strict=True)
    return torch.cat([dequantize(part, its, group, dtype=torch.float64) for part, its in parts], dim=1)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_static", "none"])
def test_results_are_of_order_one(values: str, scheme: str) -> None:
    tensors = build(Case(scheme=scheme, values=values, inter=384, tokens=6))
    inner = reference(tensors)
    w2 = dequantised(tensors.quant, tensors.weights.w2, tensors.weights.w2_scale, False)
    output = (inner[:, :, None] @ w2[tensors.topk_ids.long()].transpose(2, 3)).abs().amax()
    # Loud tokens square their factor of 1000 or 2000; half of the experts are faint in a bimodal checkpoint.
    low, high = (1e-4, 1e8) if values in ("loud_quiet", "bimodal_scales", "overflow") else (0.1, 1e3)
    assert low < float(output) < high
    assert float(inner.abs().amax()) > 0.05


@pytest.mark.parametrize("values", VALUES)
def test_static_scales_saturate_a_little(values: str) -> None:
    tensors = build(Case(scheme="tensor_static", values=values, inter=384, tokens=6))
    a13, a2 = tensors.weights.a13_scale, tensors.weights.a2_scale
    assert a13 is not None
    assert a2 is not None
    assert float(a13) == pytest.approx(float(tensors.hidden_states.abs().max()) / 448, rel=1e-6)
    peak = float(reference(tensors).abs().max())
    assert 0.3 < peak / (448 * float(a2)) < 3


def test_static_scales_saturate_in_most_cases() -> None:
    over = 0
    for seed in range(10):
        tensors = build(Case(scheme="tensor_static", hidden=128, inter=128, tokens=8, seed=seed))
        assert tensors.weights.a2_scale is not None
        over += float(reference(tensors).abs().max()) > 448 * float(tensors.weights.a2_scale)
    assert over >= 7


def test_static_scales_of_nothing() -> None:
    for case in (Case(scheme="tensor_static", tokens=0), Case(scheme="tensor_static", tokens=1, top_k=1, law="masked")):
        check(build(case))


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_static"])
def test_fnuz_is_the_same_numbers(scheme: str) -> None:
    plain, fnuz = (build(Case(scheme=scheme, fnuz=on)) for on in (False, True))
    assert fnuz.weights.w13.dtype == torch.float8_e4m3fnuz
    assert not bool((fnuz.weights.w13.view(torch.uint8) == 0x80).any())
    for name in ("w13", "w2"):
        numbers = [
            dequantised(one.quant, getattr(one.weights, name), getattr(one.weights, f"{name}_scale"), name == "w13")
            for one in (plain, fnuz)
        ]
        assert torch.equal(*numbers)
    for name in ("a13_scale", "a2_scale"):
        if scheme == "tensor_static":
            assert torch.equal(2 * getattr(plain.weights, name), getattr(fnuz.weights, name))


def test_strided_hidden_states_lie_between_nans() -> None:
    plain, apart = build(Case()).hidden_states, build(Case(layout="strided")).hidden_states
    assert torch.equal(plain, apart)
    assert apart.stride() == (256 + ROW_GAP, 1)
    assert apart.storage_offset() == ROW_GAP // 2
    storage = torch.empty(0, dtype=apart.dtype).set_(apart.untyped_storage())
    assert int(storage.isnan().sum()) == 16 * ROW_GAP


def test_expert_parallel_ranks_partition_the_experts() -> None:
    ranks = [Case(experts=12, ep=f"4:{rank}", law="all_to_one", tokens=20) for rank in range(4)]
    maps = torch.stack([expert_map for case in ranks if (expert_map := expert_map_of(case)) is not None])
    assert torch.equal((maps >= 0).sum(dim=0), torch.ones(12, dtype=torch.int64))
    for rank, case in enumerate(ranks):
        tensors = build(case)
        assert maps[rank, 3 * rank : 3 * rank + 3].tolist() == [0, 1, 2]
        assert (tensors.config.num_local_experts, tensors.config.ep_size, tensors.config.ep_rank) == (3, 4, rank)
        assert tensors.config.use_ep
        assert tensors.weights.w13.shape[0] == 3
        busiest = torch.bincount(tensors.topk_ids.flatten().long(), minlength=12).argmax()
        assert int(maps[rank, busiest]) == 2


def test_rotation_keeps_masked_slots_and_order() -> None:
    case = Case(experts=12, law="masked", tokens=50)
    plain, rotated = routing(case)[1], routing(replace(case, ep="4:2"))[1]
    assert torch.equal(plain < 0, rotated < 0)
    assert len(((rotated - plain) % 12)[plain >= 0].unique()) == 1


def test_judged_tokens() -> None:
    assert judged_tokens(Case(tokens=0)).tolist() == []
    assert judged_tokens(Case(tokens=64)).tolist() == list(range(64))
    many = judged_tokens(Case(tokens=4000)).tolist()
    assert len(set(many)) == 64
    assert many == sorted(many)
    assert {0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 3999} <= set(many)
    assert judged_tokens(Case(tokens=4000)).tolist() == many
    assert judged_tokens(Case(tokens=4000, seed=1)).tolist() != many
    assert {0, 63, 64, 65, 127, 128, 129} <= set(judged_tokens(Case(tokens=130)).tolist())


def test_judged_tokens_have_experts_here() -> None:
    case = Case(model="deepseek-v3:ep64r3", tokens=500)
    expert_map = expert_map_of(case)
    assert expert_map is not None
    here = (expert_map[routing(case)[1].long()] >= 0).any(dim=1)
    assert int(here[judged_tokens(case)].sum()) >= min(int(here.sum()), 64 - 11)


def test_a_published_model_is_built() -> None:
    case = next(case for case in seed_cases(60 << 20) if case.scheme == "block" and case.experts == 256)
    tensors = build(case)
    check(tensors)
    assert tensors.config.router_logits_dtype == torch.float32
    assert bool((tensors.topk_ids >= 0).all())
