"""Every routing law and every value regime shows what it claims."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance import codes
from conformance.build import CaseTensors, build
from conformance.cases import LAWS, VALUES, Case
from conformance.draw import Draw
from conformance.laws import LAWS as WRITTEN_LAWS
from conformance.laws import Routing, router
from conformance.models import MODELS
from conformance.regimes import GROUP
from fp8moe.keys import GroupShape
from fp8moe.scaling import decode, encode, group_amax

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, EXPERTS, TOP_K = 96, 16, 4
BY_GROUP = GroupShape(1, GROUP)


def drawn(law: str, tokens: int = TOKENS, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 0) -> Routing:
    return WRITTEN_LAWS[law](Draw(seed), tokens, experts, top_k)


def loads(ids: Tensor, experts: int = EXPERTS) -> Tensor:
    return torch.bincount(ids[ids >= 0].long(), minlength=experts)


def has_repeats(ids: Tensor) -> Tensor:
    """Per row: whether an expert is named twice."""
    ordered = ids.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)


@settings(max_examples=150, deadline=None)
@given(
    law=st.sampled_from(LAWS),
    tokens=st.integers(0, 40),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_law_gives_a_valid_routing(law: str, tokens: int, experts: int, top_k: int, seed: int) -> None:
    try:
        Case(tokens=tokens, experts=experts, top_k=top_k, law=law)
    except ValueError:
        assume(False)
    weights, ids = drawn(law, tokens, experts, top_k, seed)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (tokens, top_k)
    assert bool(((ids >= -1) & (ids < experts)).all())
    assert bool(((weights >= 0) & (weights <= 3)).all())
    if law not in ("masked", "one_each"):
        assert bool((ids >= 0).all())
    if law != "repeated":
        assert not bool(has_repeats(ids).any())
    again = drawn(law, tokens, experts, top_k, seed)
    assert torch.equal(weights, again[0])
    assert torch.equal(ids, again[1])


@pytest.mark.parametrize("law", [law for law in LAWS if law != "unnormalised"])
def test_weights_sum_to_one_and_differ(law: str) -> None:
    weights, _ = drawn(law)
    assert bool(((weights.double().sum(dim=1) - 1).abs() < 1e-6).all())
    assert bool((weights.max(dim=1).values > 1.5 * weights.min(dim=1).values).float().mean() > 0.9)
    single, _ = drawn(law, top_k=1) if law != "repeated" else drawn("uniform", top_k=1)
    assert law == "router" or float(single.min()) < 0.2  # of two or more experts a softmax takes one share; of one, all


def test_uniform_uses_every_expert_about_equally() -> None:
    load = loads(drawn("uniform", 4096)[1])
    assert bool(((load - 1024).abs() < 150).all())


def test_skewed_follows_popularity() -> None:
    load = loads(drawn("skewed", 4096, top_k=1)[1]).sort(descending=True).values.double()
    expected = 4096 / torch.arange(1, EXPERTS + 1) / sum(1 / rank for rank in range(1, EXPERTS + 1))
    assert bool(((load - expected).abs() < 6 * expected.sqrt()).all())


def test_all_to_one() -> None:
    ids = drawn("all_to_one")[1]
    assert len(ids[:, 0].unique()) == 1
    assert len({int(drawn("all_to_one", seed=seed)[1][0, 0]) for seed in range(20)}) > 5


def test_last() -> None:
    assert bool((drawn("last")[1][:, 0] == EXPERTS - 1).all())


def test_one_each() -> None:
    ids = drawn("one_each")[1]
    assert loads(ids).tolist() == [1] * EXPERTS
    assert int((ids < 0).sum()) == TOKENS * TOP_K - EXPERTS
    assert int(loads(drawn("one_each", 2)[1]).max()) == 1


def test_empty() -> None:
    for experts in (2, 5, 16):
        load = loads(drawn("empty", experts=experts, top_k=1)[1], experts)
        assert int((load == 0).sum()) == experts // 2


def test_repeated() -> None:
    weights, ids = drawn("repeated")
    assert has_repeats(ids).tolist() == [token % 2 == 0 for token in range(TOKENS)]
    assert bool((weights[::2, 0] != weights[::2, -1]).all())


def test_masked() -> None:
    ids = drawn("masked")[1]
    gone = ids < 0
    assert bool(gone[TOKENS // 2].all())
    assert not bool(gone[0].any())
    assert 0.15 < float(gone.float().mean()) < 0.35
    assert (drawn("masked", 1)[1] < 0).tolist() == [[False] * (TOP_K - 1) + [True]]


def test_unnormalised() -> None:
    weights, _ = drawn("unnormalised")
    sums = weights.double().sum(dim=1)
    assert bool(((sums[::2] - 0.2).abs() < 1e-6).all())
    assert bool(((sums[1::2] - 3.0).abs() < 1e-5).all())
    assert (weights == 0).nonzero().tolist() == [[token, 0] for token in range(0, TOKENS, 4)]


def test_router_follows_the_model() -> None:
    model = MODELS["deepseek-v3"]
    weights, ids = router(Draw(0), 64, model.experts, model.top_k, model.router)
    groups = ids // 32
    assert max(len(row.unique()) for row in groups) == 4
    assert bool(((weights.sum(dim=1) - 2.5).abs() < 1e-5).all())
    scout = MODELS["llama-4-scout"]
    weights, _ = router(Draw(0), 64, scout.experts, scout.top_k, scout.router)
    assert bool(((weights > 0.5) & (weights < 1)).all())


def regime(values: str, **fields: object) -> CaseTensors:
    sizes: dict[str, object] = {"hidden": 512, "inter": 384, "tokens": 12, "experts": 4}
    return build(Case(values=values, **(sizes | fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_regime_is_finite_and_signed_as_it_says(values: str, dtype: str) -> None:
    tensors = regime(values, dtype=dtype)
    for name, tensor in tensors.named().items():
        assert bool(torch.isfinite(tensor.float()).all()), name
    for tensor in (tensors.hidden_states, tensors.weights.w13, tensors.weights.w2):
        assert bool((tensor.float() < 0).any()) == (values != "same_sign")


def test_code_tables() -> None:
    values = torch.tensor([codes.code_value(code) for code in range(127)])
    assert torch.equal(values, decode(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)))
    drawn_codes = decode(codes.gaussian().view(torch.float8_e4m3fn))
    assert float(drawn_codes.std()) == pytest.approx(codes.GAUSSIAN_DEVIATION, rel=0.005)
    assert float(drawn_codes.abs().max()) == 448
    assert float((drawn_codes == 448).sum()) >= 2  # both reached and rare
    exact = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536) * codes.GAUSSIAN_DEVIATION
    rounded = decode(encode(exact)).sort().values
    assert float((drawn_codes.sort().values != rounded).double().mean()) < 0.005
    assert torch.equal(decode(codes.gaussian(positive=True).view(torch.float8_e4m3fn)) >= 0, torch.full((65536,), True))
    grid = decode(codes.subnormal_grid().view(torch.float8_e4m3fn)) * 512
    assert grid.unique().tolist() == list(range(-15, 16))
    whole = decode(codes.small_integers().view(torch.float8_e4m3fn))
    assert whole.unique().tolist() == list(range(-7, 8))
    assert float((whole == 0).float().mean()) == 0.5


def test_iid_has_nearly_equal_scales() -> None:
    scale = regime("iid").weights.w13_scale
    assert scale is not None
    assert float(scale.max() / scale.min()) < 1.3
    assert len(scale.unique()) == scale.numel()


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_tok"])
def test_block_scales_spread_and_part_gate_from_up(scheme: str) -> None:
    tensors = regime("block_scales", scheme=scheme, experts=16, hidden=1024)
    scale, w13 = tensors.weights.w13_scale, tensors.weights.w13
    assert scale is not None
    half = w13.shape[1] // 2
    rms = w13.float().square().mean(dim=(0, 2)).sqrt()
    gate, up = rms[:half].mean(), rms[half:].mean()
    if scheme == "tensor_tok":
        assert float(gate / up) == pytest.approx(16, rel=0.05)
        assert float(scale.max() / scale.min()) > 50
    else:
        blocks = scale.shape[1] // 2
        spread = scale[:, :blocks]
        assert 2**8.5 < float(spread.max() / spread.min()) < 2**10
        assert 8 < float(scale[:, :blocks].log2().mean().exp2() / scale[:, blocks:].log2().mean().exp2()) < 32
    amax = group_amax(tensors.hidden_states, BY_GROUP)
    assert float(amax.max() / amax.min()) > 2**7


def test_outlier_channels() -> None:
    rms = regime("outlier_channels", tokens=64).hidden_states.float().square().mean(dim=0).sqrt()
    loud = rms > 16
    assert 0 < int(loud.sum()) <= 512 // 64
    assert float(rms[~loud].max()) < 2


def test_loud_and_quiet_tokens() -> None:
    sizes = regime("loud_quiet").hidden_states.float().square().mean(dim=1).sqrt().sort().values
    assert float(sizes[8:].min()) > 800
    assert 0.8 < float(sizes[4]) < float(sizes[7]) < 1.2
    assert float(sizes[:4].max()) < 0.0012
    assert float(regime("loud_quiet", dtype="fp16").hidden_states.abs().max()) < 64


def test_zero_blocks() -> None:
    tensors = regime("zero_blocks")
    groups = tensors.hidden_states.float().reshape(12, 4, GROUP).abs().amax(dim=2)
    assert bool((groups[6] == 0).all())
    assert bool(((groups == 0).any(dim=1) & ((groups != 0).any(dim=1) | (torch.arange(12) == 6))).all())
    w13, scale = tensors.weights.w13, tensors.weights.w13_scale
    assert scale is not None
    assert not bool(w13[0].float().any())
    blocks = w13.float().reshape(4, 6, GROUP, 4, GROUP).abs().amax(dim=(2, 4))
    assert bool((blocks[1:] == 0).flatten(1).any(dim=1).all())
    assert bool((blocks[1:] != 0).flatten(1).any(dim=1).all())
    assert bool((scale == 0).any())
    assert bool(((scale > 0) & (scale < 1e-20)).any())
    assert bool((blocks[scale < 1e-20] == 0).all())
    for scheme in ("channel_tok", "tensor_static", "none"):
        weights = regime("zero_blocks", scheme=scheme).weights
        assert not bool(weights.w2[0].float().any())
        assert bool(weights.w2[1].float().any())
        if weights.w2_scale is not None:
            assert bool(torch.isfinite(weights.w2_scale).all())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_subnormals(dtype: str) -> None:
    tensors = regime("subnormals", dtype=dtype)
    groups = tensors.hidden_states.float().reshape(12, 4, GROUP)
    amax = groups.abs().amax(dim=2, keepdim=True)
    assert torch.equal(groups[..., :1].abs(), amax)
    small = (groups * (448 / amax))[..., 1:].abs()
    assert float(small.max()) <= 2**-6 * 1.02  # fp16 rounds the quietest token on a coarse grid
    assert float((small > 2**-10).float().mean()) > 0.8  # do not vanish either
    assert len(amax.unique()) == 4
    codes_of_w13 = tensors.weights.w13.view(torch.uint8)
    assert not bool(codes_of_w13[..., ::GROUP].any())
    assert bool(((codes_of_w13 & 0x7F) < 16).all())
    assert float(((codes_of_w13 & 0x7F) < 8).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_exact_grid_has_an_exact_first_gemm() -> None:
    tensors = regime("exact_grid")
    steps = tensors.hidden_states.double() * 4
    assert torch.equal(steps, steps.round())
    assert bool((group_amax(tensors.hidden_states, BY_GROUP) == 1.75).all())
    scale = tensors.weights.w13_scale
    assert scale is not None
    assert math.frexp(float(scale.unique()))[0] == 0.5
    terms = steps.abs()[:, :GROUP] @ tensors.weights.w13[1, :, :GROUP].double().abs().T
    assert float(terms.max()) < 2**13


def test_one_hot() -> None:
    hidden = regime("one_hot", tokens=64).hidden_states
    assert (hidden != 0).sum(dim=1).tolist() == [1] * 64
    assert len((hidden != 0).nonzero()[:, 1].unique()) > 40


def test_bimodal_scales() -> None:
    for scheme in ("block", "channel_tok", "tensor_tok"):
        scale = regime("bimodal_scales", scheme=scheme, experts=32).weights.w2_scale
        assert scale is not None
        ordered = scale.flatten().sort().values
        gaps = ordered[1:] / ordered[:-1]
        assert float(gaps.max()) == pytest.approx(1e4, rel=0.4)
        assert float(gaps.sort().values[-2]) < 1.3


def test_single_block() -> None:
    groups = regime("single_block").hidden_states.float().reshape(12, 4, GROUP).abs().amax(dim=2) > 0
    assert groups.sum(dim=1).tolist() == [1] * 12
    assert groups.sum(dim=0).tolist() == [3] * 4
    assert groups[0].tolist() == groups[4].tolist() != groups[1].tolist()
    assert (regime("single_block", hidden=144).hidden_states != 0).sum(dim=1).sort().values.tolist() == [16] * 6 + [
        GROUP
    ] * 6


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [BY_GROUP, GroupShape.PER_TOKEN, GroupShape.PER_TENSOR])
def test_ties(dtype: str, group: GroupShape) -> None:
    """Under every scheme the scale is a power of two, and half of the values lie between two codes, none on a limit."""
    hidden = regime("ties", dtype=dtype, tokens=64).hidden_states
    amax = group_amax(hidden, group)
    assert bool((torch.frexp(amax)[0] == 1.75 / 2).all())
    width = {BY_GROUP: GROUP, GroupShape.PER_TOKEN: 512}.get(group, hidden.numel())
    over = hidden.double().reshape(-1, width) * 448 / amax.double().reshape(-1, 1)
    codes_apart = torch.frexp(over)[1].double().sub(4).exp2()
    between = (over / codes_apart).frac().abs()
    assert between.unique().tolist() == [0, 0.5]
    assert float((between == 0.5).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert len(over.sign().unique()) == 2


def test_wide_groups() -> None:
    tensors = regime("wide_groups", tokens=64)
    channels = tensors.hidden_states.float().square().mean(dim=0).sqrt().reshape(4, GROUP)
    assert bool((channels.amax(dim=1) / channels.amin(dim=1) > 2**11.5).all())
    first = tensors.weights.w13.float().square().mean(dim=(0, 2)).sqrt().reshape(2, 3, GROUP)
    assert bool((first.amax(dim=2) / first.amin(dim=2) > 2**4.5).all())  # the quietest are partly subnormal
    second = tensors.weights.w2.float().square().mean(dim=(0, 1)).sqrt()
    assert float(second.max() / second.min()) == pytest.approx(2**12, rel=0.1)
    assert bool((second[:7].diff() > 0).all() and (first[:, 0, :7].diff() < 0).all())
    unquantised = regime("wide_groups", scheme="none").weights.w2.float().square().mean(dim=(0, 1)).sqrt()
    assert float(unquantised.max() / unquantised.min()) == pytest.approx(2**12, rel=0.1)


def test_near_limit() -> None:
    hidden = regime("near_limit", tokens=64).hidden_states.float()
    groups = hidden.reshape(64, 4, GROUP).abs()
    assert bool((groups.amax(dim=2) == 1.75).all())
    codes_of = groups * 256
    for limit in (448, 416, 288, 256, 240, 224):
        assert 1 / 100 < float((codes_of == limit).double().mean()) < 1 / 25
    assert bool(((codes_of > 240).sum(dim=2) > 1).all())
