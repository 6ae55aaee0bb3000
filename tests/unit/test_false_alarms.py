"""Cases on which the judge once accused an honest backend: they pass, and stay here."""

from __future__ import annotations

import pytest
import torch

from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Recipe

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
ACCUSED = {
    # TN: tokens that are their bias alone, so that a few values in many columns are all rounded far
    "v1:E=5,k=1,H=320,I=320,M=65,act=gelu_no_mul,law=empty,values=bimodal_scales,bias=on,seed=217": Recipe(),
    # E1: the tail of torch's gelu in fp32
    "v1:E=5,H=128,I=128,M=31,scheme=tensor_tok,dtype=fp16,act=gelu_no_mul,law=unnormalised,values=exact_grid,"
    "bias=on,seed=149": Recipe(),
    "v1:E=5,H=128,I=128,M=31,scheme=tensor_tok,dtype=fp16,act=gelu_no_mul,law=unnormalised,values=exact_grid,"
    "bias=on,seed=130": Recipe(),
    "v1:E=6,k=3,H=512,I=144,M=63,act=gelu_no_mul,law=masked,values=bimodal_scales,fnuz=on,seed=17380": Recipe(
        amax_floor=1e-4, dynamic_tensor_scope="expert", activation_output="input"
    ),
    # gain, likewise
    "v1:E=16,H=512,M=48,scheme=tensor_tok,act=gelu_no_mul,values=zero_blocks,ep=4:3,bias=on,layout=strided,"
    "seed=214": Recipe(scaling="reciprocal"),
    "v1:E=1,k=1,H=272,I=272,M=65,scheme=tensor_static,act=gelu,law=skewed,values=loud_quiet,bias=on,layout=strided,"
    "seed=512": Recipe(),
    "v1:k=4,M=65,scheme=block_none,act=gelu,law=repeated,values=bimodal_scales,ep=2:0,bias=on,seed=10617": Recipe(
        scaling="reciprocal"
    ),
    # finite: products that were infinities of 16 bits before their bias was added
    "v1:M=16,scheme=tensor_static,dtype=fp16,values=overflow,bias=on": Recipe(bias="input"),
    "v1:M=16,scheme=tensor_static,dtype=fp16,act=relu2_no_mul,values=overflow,bias=on": Recipe(bias="input"),
    # a suite error: nothing to judge, in a shape with odd strides
    "v1:E=1,k=1,M=0": Recipe(),
}


@pytest.mark.parametrize("text", ACCUSED)
def test_an_honest_backend_passes(text: str) -> None:
    cls = TorchExperts.with_recipe(ACCUSED[text])
    result = check_case(Case.parse(text), Subject("TorchExperts", cls, "TorchExperts"), HERE)
    assert result.status is Status.PASSED, result.reason


def test_a_flip_beside_elements_that_overflow() -> None:
    """E3: what an infinity hides was taken for an error of zero, which no flip explains."""
    from conformance.zoo.honest import HONEST

    text = "v1:E=3,k=3,H=128,I=1024,M=5,dtype=fp16,act=relu2_no_mul,law=repeated,values=overflow,seed=462077"
    result = check_case(Case.parse(text), Subject("split_k_4", HONEST["split_k_4"], "split_k_4"), HERE)
    assert result.status is Status.PASSED, result.reason


def test_an_infinity_on_the_far_side_of_a_flip() -> None:
    """finite: flips of a first result that is kept in FP8 are larger than some outputs, which they carry past both ends
    of fp16."""
    from conformance.bounds import judge
    from conformance.oracles import tensors_of, trace_of
    from fp8moe.recipe import FP32
    from tests.unit.honest_experts import ORDERS, ordered

    recipe = Recipe(gemm1_output="float8")
    text = "v1:M=8,H=512,I=128,k=2,scheme=tensor_tok,dtype=fp16,values=overflow,act=gelu,seed=144"
    tensors = tensors_of(Case.parse(text), "cpu")
    cls = ordered(ORDERS["odd_then_even"]).with_recipe(recipe)
    output = tensors.call(cls(tensors.config, tensors.quant, tensors.weights))
    trace = trace_of(tensors, recipe)
    assert bool((torch.isinf(output) & (torch.sign(output) != torch.sign(trace.R))).any())
    judgement = judge(trace, output, FP32)
    assert judgement.passed, judgement.reason
