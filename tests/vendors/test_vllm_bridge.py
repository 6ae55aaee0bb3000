"""The bridge to vLLM's own classes without vLLM: its entry points, its remedy, the names it uses in the release."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8moe_vllm import contracts, experts, library
from torch import Tensor

from conformance.build import build
from fp8moe import BackendUnavailable
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.envs import Env
from fp8moe.experts import contract_violations
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import LayerNotSupported
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, SCHEMES
from tests.contracts.layers import case, same, with_holes
from tests.contracts.released import VLLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "fp8moe-vllm"
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
BACKENDS: dict[str, str] = PROJECT["entry-points"]["fp8moe.backends"]
CLASSES = [getattr(experts, target.partition(":")[2]) for target in BACKENDS.values()]


def test_its_entry_points_register_classes_that_are_only_named(tmp_path: Path) -> None:
    installed = tmp_path / f"fp8moe_vllm-{PROJECT['version']}.dist-info"
    installed.mkdir()
    about = f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n"
    (installed / "METADATA").write_text(about)
    points = "".join(f"{name} = {target}\n" for name, target in BACKENDS.items())
    (installed / "entry_points.txt").write_text(f"[fp8moe.backends]\n{points}")
    code = """
import json, sys
from fp8moe.registry import backend_named, default_backends, registered_backends
found = {spec.name: spec.experts_cls.__name__ for spec in registered_backends()}
scanned = [spec.name for spec in default_backends() if spec.name in found]
who = backend_named("VLLM_TRITON_EXPERTS").distribution
print(json.dumps([found, scanned, who, "vllm" in sys.modules]))
"""
    path = os.pathsep.join([str(tmp_path), str(PACKAGE), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, scanned, who, imported = json.loads(done.stdout)
    assert found == {name: target.partition(":")[2] for name, target in BACKENDS.items()}
    assert scanned == []
    assert who.startswith("fp8moe-vllm")
    assert not imported


@pytest.mark.parametrize("cls", CLASSES)
def test_without_vllm_the_remedy_is_told(cls: type[experts.VllmExperts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.E8M0, "0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    scheme = "channel_tok" if cls is experts.VllmCutlassExperts else "block"
    tensors = build(case(scheme), "cpu")
    with pytest.raises(BackendUnavailable, match=rf"{cls.__name__}: vllm is not installed; .* vllm==0\.25\.1"):
        cls(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_device_without_vllm_is_not_taken(cls: type[experts.VllmExperts]) -> None:
    assert cls.support is not None
    assert cls.support.device(PLATFORMS["h200"].with_libraries("vllm"), Env.of({}))
    for other in (PLATFORMS["h200"].with_libraries("deep_gemm"), PLATFORMS["mi300x"].with_libraries("vllm")):
        assert not cls.support.device(other, Env.of({}))


def test_a_vllm_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("no NVML here\nand more")

    monkeypatch.setenv(library.E8M0, "0")
    monkeypatch.setattr(library, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(BackendUnavailable, match=r"X: vllm does not load \(RuntimeError: no NVML here\); install vllm"):
        library.load("X", experts.VllmTritonExperts.which)
    monkeypatch.setattr(library, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace()))
    with pytest.raises(BackendUnavailable, match="has no TritonExperts: another version"):
        library.load("X", experts.VllmTritonExperts.which)


def test_another_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.E8M0, "0")
    other = SimpleNamespace(__version__="0.33.0+cu130")
    monkeypatch.setattr(library, "importlib", SimpleNamespace(import_module=lambda name: other))
    with pytest.raises(
        BackendUnavailable, match=r"X: vllm 0\.33\.0 is installed, another version; install vllm==0\.25"
    ):
        library.load("X", experts.VllmTritonExperts.which)
    assert f"version = '{library.RELEASE}'" in VLLM.source("vllm/_version.py")


@pytest.mark.parametrize("cls", CLASSES)
def test_it_keeps_the_contract(cls: type[experts.VllmExperts]) -> None:
    assert contract_violations(cls) == []


@pytest.mark.parametrize(
    ("cls", "scheme", "fields", "why"),
    [
        (experts.VllmTritonExperts, "tensor_tok", {}, "it does not take tensor_tok"),
        (experts.VllmCutlassExperts, "block", {}, "it does not take block"),
        (experts.VllmTritonExperts, "block", {"bias": True}, "biases"),
        (experts.VllmTritonExperts, "block", {"inter": 192}, "expected multiples of 128"),
        (
            experts.VllmTritonExperts,
            "block",
            {"activation": "swiglustep"},
            "activation=swiglustep: expected gelu, silu",
        ),
        (experts.VllmTritonExperts, "block", {"activation": "silu_no_mul"}, "activation=silu_no_mul"),
        (experts.VllmDeepGemmExperts, "block", {"hidden": 384}, "hidden_dim=384: expected a multiple of 1024"),
        (experts.VllmDeepGemmExperts, "block", {"dtype": "fp16"}, "expected torch.bfloat16"),
        (experts.VllmMarlinExperts, "block_none", {"inter": 272}, "sizes 256 and 272: expected multiples of 128"),
        (experts.VllmMarlinExperts, "channel_tok", {"hidden": 144}, "hidden_dim=144: expected a multiple of 128"),
    ],
)
def test_layers_that_it_cannot_take(
    cls: type[experts.VllmExperts], scheme: str, fields: dict[str, Any], why: str
) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    with pytest.raises(LayerNotSupported, match=why):
        cls(tensors.config, tensors.quant, tensors.weights)


class Played(experts.VllmTritonExperts):
    """TorchExperts in place of vLLM, which is told apart by what it gets: no -1, weights in fp32, ids in int32."""

    def made(self) -> Any:
        def call(states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, on_input: bool) -> Tensor:
            limit = self.config.num_local_experts if expert_map is None else expert_map.numel()
            assert states.is_contiguous()
            assert weights.dtype == torch.float32
            assert ids.dtype == torch.int32
            assert int(ids.min()) >= 0
            assert int(ids.max()) < limit
            more = {"expert_map": expert_map, "apply_router_weight_on_input": on_input}
            honest = TorchExperts(replace(self.config, num_experts=limit), self.quant, self.weights)
            return honest.apply(states, weights, ids, **more)

        return call


@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}, {"layout": "strided"}, {"top_k": 1, "weight_on_input": True}])
@pytest.mark.parametrize("scheme", ["block", "channel_tok"])
def test_absent_pairs_add_nothing(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    played = Played(tensors.config, tensors.quant, tensors.weights)
    output = torch.full_like(expected, torch.nan)
    assert tensors.call(played, output) is output
    assert same(output, expected)
    assert same(tensors.call(played), expected)


@pytest.mark.parametrize("fields", [{}, {"law": "one_each"}, {"ep": "2:1"}, {"layout": "strided"}])
def test_a_token_without_experts_brings_nothing_into_a_shared_scale(fields: dict[str, Any]) -> None:
    tensors = with_holes(case("tensor_dyn", **fields))
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(Played(tensors.config, tensors.quant, tensors.weights)), expected)


def test_a_caller_is_vllms_call_alone() -> None:
    from fp8moe_vllm.callers import TritonCaller

    seen: list[tuple[Any, ...]] = []

    class Bare(TritonCaller):
        def made(self) -> Any:
            return lambda *given: seen.append(given) or given[0]

    tensors = build(case("block"), "cpu")
    bare = Bare(tensors.config, tensors.quant, tensors.weights)
    assert tensors.call(bare, torch.empty_like(tensors.hidden_states)) is tensors.hidden_states
    assert [one is two for one, two in zip(seen[0], (tensors.hidden_states, tensors.topk_weights), strict=False)]
    assert seen[0][2] is tensors.topk_ids
    assert bare.contract == contracts.triton(BLOCK, "silu")


def test_what_is_declared() -> None:
    fused = contracts.triton(BLOCK, "silu").recipe
    assert (fused.gate_output, fused.activation_output) == ("float32", "float32")
    assert (fused.amax_floor, fused.intermediate_amax_floor) == (1e-10, 1 / 512)
    apart = contracts.triton(BLOCK, "gelu").recipe
    assert (apart.gate_output, apart.activation_output, apart.amax_floor) == ("input", "input", 1e-10)
    assert contracts.triton(CHANNEL_TOKEN, "silu").recipe.activation_output == "input"
    for kind in (contracts.triton, contracts.cutlass, contracts.deepgemm, contracts.marlin):
        assert kind(CHANNEL_TOKEN, "silu").recipe.gate_output == "input"
    assert contracts.deepgemm(BLOCK, "silu").recipe.scale_division == "divide"
    assert contracts.cutlass(SCHEMES["tensor_dyn"], "silu").recipe.amax_floor == 0
    assert contracts.cutlass(CHANNEL_TOKEN, "silu").recipe.amax_floor == 1 / 512
    assert contracts.triton_or_deepgemm(BLOCK, "silu", 1024, 512) == contracts.triton(BLOCK, "silu")
    wide = contracts.triton_or_deepgemm(BLOCK, "silu", 1024, 1024)
    assert wide.for_tokens(127) == contracts.triton(BLOCK, "silu")
    assert wide.for_tokens(128) == contracts.deepgemm(BLOCK, "silu")


# What is used of vLLM, beside its release.


def path_of(module: str) -> str:
    return module.replace(".", "/")


@cache
def tree_of(module: str) -> ast.Module:
    """A module's source in the wheel; a package's is its __init__."""
    try:
        source = VLLM.source(f"{path_of(module)}.py")
    except AssertionError:
        source = VLLM.source(f"{path_of(module)}/__init__.py")
    return ast.parse(source)


def defined(module: str, name: str) -> ast.AST:
    """What a module calls so: where it only imports it, where it comes from."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            base = f"{module}." if node.level else ""
            return defined(f"{base}{node.module}", name)
    raise AssertionError(f"vllm {VLLM.version}: {module} has no {name}")


def member(node: ast.AST, name: str) -> ast.FunctionDef | None:
    assert isinstance(node, ast.ClassDef)
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name), None)


def parameters(node: ast.AST) -> set[str]:
    """What can be given by name: to a function, or to a class by its __init__ or, where it has none, its fields."""
    if isinstance(node, ast.ClassDef):
        init = member(node, "__init__")
        if init is None:
            return {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and hasattr(one.target, "id")}
        node = init
    assert isinstance(node, ast.FunctionDef)
    return {one.arg for one in (*node.args.args, *node.args.kwonlyargs)}


def needed(node: ast.AST) -> set[str]:
    """Those without a default."""
    if isinstance(node, ast.ClassDef):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and one.value is None]
        return {one.target.id for one in fields if isinstance(one.target, ast.Name)}
    assert isinstance(node, ast.FunctionDef)
    plain = node.args.args[: len(node.args.args) - len(node.args.defaults)]
    only = [one for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is None]
    return {one.arg for one in (*plain, *only)} - {"self", "cls"}


def imported() -> Iterator[tuple[str, str, str]]:
    """(module, name, name here) of every import of vLLM's in the bridge."""
    for path in sorted((PACKAGE / "fp8moe_vllm").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((str(node.module), one.name, one.asname or one.name) for one in node.names)
            assert not isinstance(node, ast.Import) or all(one.name.split(".")[0] != "vllm" for one in node.names)


def calls_of_library() -> list[ast.Call]:
    tree = ast.parse((PACKAGE / "fp8moe_vllm" / "library.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> set[str]:
    return {str(one.arg) for one in call.keywords}


def test_every_name_is_in_the_release() -> None:
    found = list(imported())
    assert len(found) >= 15
    for module, name, _ in found:
        defined(module, name)


def test_every_argument_is_in_the_release() -> None:
    functions = {here: defined(module, name) for module, name, here in imported()}
    checked = set()
    for call in calls_of_library():
        if isinstance(call.func, ast.Name) and call.func.id in functions and call.keywords:
            node = functions[call.func.id]
            assert keywords(call) <= parameters(node), call.func.id
            assert needed(node) <= keywords(call), call.func.id
            checked.add(call.func.id)
    assert checked == {
        "VllmConfigOfLayer",
        "convert_to_fp8_moe_kernel_format",
        "make_fp8_moe_kernel",
        "make_fp8_moe_quant_config",
    }


def test_every_method_is_in_the_release() -> None:
    layers = "vllm.model_executor.layers.fused_moe"
    apply = member(defined(f"{layers}.modular_kernel", "FusedMoEKernel"), "apply")
    assert apply is not None
    (call,) = [one for one in calls_of_library() if isinstance(one.func, ast.Attribute) and one.func.attr == "apply"]
    assert keywords(call) <= parameters(apply)
    assert needed(apply) <= keywords(call)
    assert member(defined(f"{layers}.config", "FusedMoEParallelConfig"), "make_no_parallel") is not None
    manager = member(defined("vllm.v1.worker.workspace", "WorkspaceManager"), "get_simultaneous")
    assert manager is not None
    assert manager.args.vararg is not None  # shapes and dtypes, nothing by name
    assert parameters(manager) == {"self"}


def test_every_class_and_value_is_in_the_release() -> None:
    layers = "vllm.model_executor.layers.fused_moe"
    for cls in CLASSES:
        assert isinstance(defined(cls.which.module, cls.which.name), ast.ClassDef)
    values = {
        (module, name): {
            one.value.value
            for one in defined(module, name).body  # type: ignore[attr-defined]
            if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)
        }
        for module, name in ((library.ORACLE, "Fp8MoeBackend"), (f"{layers}.activation", "MoEActivation"))
    }
    backends, activations = values.values()
    assert {cls.which.backend for cls in CLASSES} <= backends
    assert activations >= experts.WITH_GELU
    names = {
        one.attr for one in ast.walk(ast.parse(Path(library.__file__).read_text())) if isinstance(one, ast.Attribute)
    }
    assert "Renormalize" in names
    assert "Renormalize" in ast.dump(defined(f"{layers}.config", "RoutingMethodType"))


def test_the_switch_for_fp32_scales_is_in_the_release() -> None:
    assert f'"{library.E8M0}"' in VLLM.source("vllm/envs.py")
    source = VLLM.source("vllm/utils/deep_gemm.py")
    assert f"envs.{library.E8M0}" in source
    assert "@functools.cache\ndef is_deep_gemm_e8m0_used" in source


@pytest.mark.parametrize("given", [None, "1"])
def test_the_switch_is_set_for_vllm_alone(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is None:
        monkeypatch.delenv(library.E8M0, raising=False)
    else:
        monkeypatch.setenv(library.E8M0, given)
    seen = []
    module = SimpleNamespace(TritonExperts=object)

    def imported(name: str) -> Any:
        seen.append(os.environ.get(library.E8M0))
        return module

    monkeypatch.setattr(library, "importlib", SimpleNamespace(import_module=imported))
    monkeypatch.setattr(library, "_refuse_powers_of_two", lambda user: imported("asked"))
    assert library.load("X", experts.VllmTritonExperts.which) is object
    assert set(seen) == {given or "0"}
    assert os.environ.get(library.E8M0) == given


def test_what_the_conversion_reads_of_a_layer_is_there() -> None:
    tensors = build(case("block"), "cpu")
    described = library._described(tensors.config, tensors.weights, [128, 128])
    read = set()
    for module, name in (
        (library.ORACLE, "convert_to_fp8_moe_kernel_format"),
        ("vllm.model_executor.layers.quantization.utils.marlin_utils_fp8", "prepare_fp8_moe_layer_for_marlin"),
    ):
        for node in ast.walk(defined(module, name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "layer":
                read.add(node.attr)
    others = {"workspace", "w13_weight_scale", "w2_weight_scale"}  # written there; those of another backend
    assert read - others <= set(vars(described)), read
    assert not hasattr(library._described(tensors.config, tensors.weights, None), "weight_block_size")
