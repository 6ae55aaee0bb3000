"""What the bridge declares of vLLM's roundings beside the release's own Python, run without vLLM and without a GPU.

Two of its functions are run, out of a wheel that is pinned by its digest. Its CUDA kernels are in no wheel as text;
`fp8moe_vllm.contracts` says which of their sources were read.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fp8moe_vllm import contracts, experts
from torch import Tensor

from conformance.bounds import judge
from conformance.build import build
from conformance.cases import Case
from conformance.oracles import trace_of
from fp8moe.backends.marlin import contract_for
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.layouts.marlin import left_out
from fp8moe.recipe import Arithmetic, Recipe, Steps
from fp8moe.reference.replay import replay_moe
from fp8moe.schemes import SCHEMES
from tests.contracts.layers import case
from tests.contracts.released import VLLM

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTISATION = "vllm/model_executor/layers/quantization/utils"
ROOT = Path(__file__).parents[2]
FUSED = "_silu_mul_per_token_group_quant_fp8_colmajor"
SHOW = """
import json, sys
import torch
from released import KERNEL
from fp8moe.activations import activate
from fp8moe.scaling import group_amax
from fp8moe.keys import GroupShape

rows, columns = 64, 256
first = (torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(0)) * 4).half()
codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
scales = torch.empty(columns // 128, rows).t()
given = (rows, 2 * columns, scales.stride(-1), 1e-10, 0.0, 1.0, 0.0, -448.0, 448.0, False, False, 128, 8, 128)
KERNEL[(rows // 8, columns // 128)](first, codes, scales, *given)
found = {}
for gate in (torch.float16, None):
    for result in (torch.float16, torch.float32):
        values = activate("silu", first.float(), gate).to(result).float()
        expected = group_amax(values, GroupShape(1, 128)) * torch.tensor(1 / 448)
        found[f"{gate} {result}"] = int((expected != scales).sum())
print(json.dumps(found))
"""


def function(path: str, name: str) -> str:
    """The text of one of the release's functions, without decorators."""
    source = VLLM.source(path)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            text = ast.get_source_segment(source, node)
            assert text is not None
            return text
    raise AssertionError(f"{path} of vllm {VLLM.version} has no {name}")


def test_deepgemms_kernel_rounds_the_gate_and_the_product(tmp_path: Path) -> None:
    """In Triton's interpreter, which computes with fp16 and not with bf16: its scales are, to the bit, those of silu's
    part and of the product in 16 bits, and of no other two roundings."""
    text = function(f"{QUANTISATION}/fp8_utils.py", FUSED)
    module = f"import triton\nimport triton.language as tl\n\n\n@triton.jit\n{text}\n\n\nKERNEL = {FUSED}\n"
    (tmp_path / "released.py").write_text(module)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    other = json.loads(done.stdout)
    assert other.pop("torch.float16 torch.float16") == 0
    assert all(other.values()), other


def test_marlins_preparation_makes_infinities_of_large_scales() -> None:
    """As it does in vLLM, and the bridge with it; our own adapter takes no such layer."""
    names: dict[str, object] = {"torch": torch}
    exec(function(f"{QUANTISATION}/marlin_utils_fp8.py", "fp8_fused_exponent_bias_into_scales"), names)
    prepared = names["fp8_fused_exponent_bias_into_scales"]
    assert callable(prepared)
    for dtype in (torch.bfloat16, torch.float16):
        scales = torch.tensor([1.0, 2.0**7, 2.0**8]).to(dtype)
        found: Tensor = prepared(scales)
        assert torch.equal(found[:2], scales[:2] * 2.0 ** left_out(dtype))
        assert torch.isinf(found[2])
    weights = build(Case(scheme="tensor_none", values="subnormals")).weights
    assert weights.w13_scale is not None
    assert float(weights.w13_scale.max()) > 2.0**8


def test_a_layer_of_marlins_meets_its_scales_as_our_adapter_says() -> None:
    for scheme in ("block_none", "channel_none"):
        tensors = build(case(scheme))
        contract = contracts.marlin_of(tensors.config, tensors.quant)
        ours = contract_for(tensors.config, tensors.quant)
        assert contract == replace(ours, recipe=replace(ours.recipe, input_weights="input", gate_output="input"))
    block = (SCHEMES["block_none"][0], None)
    assert experts.VllmMarlinExperts.contract == contracts.marlin(block, "silu")


ON_THE_H200 = {
    "v1:M=16,scheme=tensor_static": ("cutlass", "triton"),
    "v1:k=3,M=16,scheme=tensor_dyn": ("cutlass", "triton"),
    "v1:M=16,scheme=channel_tok": ("cutlass", "triton"),
    "v1:M=16,act=gelu": ("triton",),
    "v1:M=16": ("deepgemm",),
    "v1:k=4,H=128,I=128,M=130,seed=4": ("deepgemm",),
}
"""Cases that failed there, of whose classes."""


@pytest.mark.parametrize("text", ON_THE_H200)
def test_what_is_declared_passes_where_the_gate_alone_had_failed(text: str) -> None:
    """`TorchExperts` with the roundings that were read stands for vLLM; without the gate's it fails as vLLM did."""
    tensors = build(Case.parse(text))
    scheme = (tensors.quant.weight_key, tensors.quant.activation_key)
    for kind in ON_THE_H200[text]:
        contract = getattr(contracts, kind)(scheme, tensors.config.activation)
        assert contract.arithmetic is None or isinstance(contract.arithmetic, Arithmetic)
        backend = TorchExperts.with_recipe(contract.recipe)(tensors.config, tensors.quant, tensors.weights)
        output = tensors.call(backend)
        assert judge(trace_of(tensors, contract.recipe), output, contract.arithmetic).passed, kind
        # As it was judged then, when the sum over K was taken for one that is promoted.
        then = None if contract.arithmetic == contracts.ONE_CHAIN else contract.arithmetic
        before: Recipe = replace(contract.recipe, gate_output="float32")
        assert not judge(trace_of(tensors, before), output, then).passed, kind


ELEMENTS = {
    ("cutlass", "v1:H=1984,M=16,scheme=channel_tok"): (9, 380, -0.380859375),
    ("cutlass", "v1:H=3712,M=16,scheme=tensor_static"): (9, 3584, -0.1064453125),
    ("cutlass", "v1:H=512,I=320,M=69,scheme=channel_tok,values=block_scales,seed=1"): (51, 37, 0.0003147125244140625),
    ("triton", "v1:H=1984,M=16,scheme=channel_tok"): (9, 1759, 0.41796875),
    ("triton", "v1:H=2048,M=16,scheme=channel_tok"): (0, 1571, -0.00146484375),
    ("triton", "v1:H=512,I=320,M=41,scheme=channel_tok,values=block_scales"): (36, 40, -0.049072265625),
    ("triton", "v1:E=128,H=2048,M=56,scheme=tensor_static,ep=16:0"): (27, 1765, -0.07568359375),
}
TWICE = {
    "v1:k=1,M=16,scheme=channel_tok,on_input=on": (10, 143, -8.296966552734375e-05),
    "v1:k=1,M=16,scheme=tensor_static,on_input=on": (5, 221, 2.3632310330867767e-08),
    "v1:k=1,M=16,scheme=tensor_dyn,on_input=on": (5, 255, 6.51925802230835e-08),
}
"""What the CUTLASS class had there with routing weights on the input."""
ON_INPUT = {
    "v1:k=1,M=16,scheme=channel_tok,on_input=on": (3, 228, -0.00165557861328125),
    "v1:k=1,M=16,scheme=tensor_static,on_input=on": (5, 139, 2.6345252990722656e-05),
}
"""What vLLM's classes had on an H200 where they failed as long as nothing was declared: token, column, value."""


@pytest.mark.parametrize(("kind", "text"), ELEMENTS)
def test_all_of_k_in_one_chain_gives_the_bits_that_were_seen(kind: str, text: str) -> None:
    token, column, seen = ELEMENTS[kind, text]
    tensors = build(Case.parse(text))
    scheme = (tensors.quant.weight_key, tensors.quant.activation_key)
    contract = getattr(contracts, kind)(scheme, tensors.config.activation, *([90] if kind == "triton" else []))
    assert contract.arithmetic == contracts.ONE_CHAIN
    trace = trace_of(tensors, contract.recipe)
    for promote_every, alike in ((None, True), (128, False)):
        arithmetic = Arithmetic.on("hopper.wgmma", promote_every=promote_every)
        output = replay_moe(trace, arithmetic, Steps(scale_order="weights_first")).stages["combine"]
        assert (float(output[token, column]) == seen) == alike


@pytest.mark.parametrize("text", ON_INPUT)
def test_rounded_input_weights_give_the_bits_that_were_seen(text: str) -> None:
    token, column, seen = ON_INPUT[text]
    tensors = build(Case.parse(text))
    scheme = (tensors.quant.weight_key, tensors.quant.activation_key)
    contract = contracts.triton(scheme, tensors.config.activation, 90)
    assert isinstance(contract.arithmetic, Arithmetic)
    for recipe, alike in ((contract.recipe, True), (replace(contract.recipe, input_weights="float32"), False)):
        output = replay_moe(trace_of(tensors, recipe), contract.arithmetic, Steps()).stages["combine"]
        assert (float(output[token, column]) == seen) == alike


@pytest.mark.parametrize("text", TWICE)
def test_the_routing_weight_is_multiplied_with_twice(text: str) -> None:
    token, column, seen = TWICE[text]
    tensors = build(Case.parse(text))
    scheme = (tensors.quant.weight_key, tensors.quant.activation_key)
    contract = contracts.cutlass(scheme, tensors.config.activation)
    assert isinstance(contract.arithmetic, Arithmetic)
    trace = trace_of(tensors, contract.recipe)
    results = replay_moe(trace, contract.arithmetic, Steps(scale_order="weights_first")).stages["second_gemm"]
    once = results[(trace.pairs.token == token).nonzero()[0, 0], column]
    again = (once * tensors.topk_weights[token, 0]).to(torch.bfloat16)
    assert float(again) == seen
    assert float(once.to(torch.bfloat16)) != seen
