"""The command line: tables and JSON for devices, models and variables; exit statuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import fp8moe
from conformance.models import MODELS
from conformance.plan import load_subject
from fp8moe import cli
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.commands.platform import backend_states
from fp8moe.config import ALL2ALL_BACKENDS
from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform
from fp8moe.registry import SEED_ORDER
from fp8moe.schemes import SCHEMES
from tests.unit.command_line import explain, no_variables, python, run  # noqa: F401 (a fixture)

SEED_NAMES = [name for name, _, _ in SEED_ORDER]


# -- the command itself --


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], [], ["--version"]])
def test_help_loads_neither_torch_nor_the_suite(arguments: list[str]) -> None:
    code = """
from fp8moe.cli import main
try:
    main()
finally:
    loaded = {name for name in ("torch", "triton", "numpy", "conformance") if name in sys.modules}
    assert not loaded, loaded
"""
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert "fp8moe" in done.stdout


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("platform", "explain", "repro", "emulate", "check", "probe", "zoo"):
        assert command in text
        assert "--help" in run(command, "--help").stdout


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fp8moe", "--version"],
        cwd=Path(fp8moe.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == f"fp8moe {fp8moe.__version__}"


# -- platform --


def test_platform_as_table() -> None:
    text = run("platform").stdout
    for word in ("device", "driver", "torch", "triton", *LIBRARIES, *SEED_NAMES, "tried on no"):
        assert word in text


def test_platform_as_json() -> None:
    answer = json.loads(run("platform", "--json").stdout)
    assert set(answer) == {"format", "device", "platform", "libraries", "backends", "plug_ins_that_do_not_load"}
    assert [row["name"] for row in answer["libraries"]] == list(LIBRARIES)
    assert all(row["install"] for row in answer["libraries"])
    assert [row["backend"] for row in answer["backends"]][: len(SEED_NAMES)] == SEED_NAMES
    assert {"kind", "name", "torch", "triton", "driver", "notes"} <= set(answer["device"])


def states(platform: Platform, **env: str) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in backend_states(platform, env)}


def test_what_backends_lack() -> None:
    bare = states(PLATFORMS["h100"].with_libraries())
    assert not bare["DEEPGEMM"]["takes_device"]
    assert "deep_gemm" in bare["DEEPGEMM"]["lacks"]
    assert bare["TRITON"] == {"backend": "TRITON", "takes_device": True, "lacks": "", "adapter": "there"}
    whole = states(PLATFORMS["h100"])
    assert whole["DEEPGEMM"]["takes_device"]
    assert not states(PLATFORMS["h100"], VLLM_USE_DEEP_GEMM="0")["DEEPGEMM"]["takes_device"]


def test_a_library_without_what_it_compiles_with_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    given = {"CUDA_HOME": str(tmp_path), "PATH": ""}
    for name in ("DEEPGEMM", "BATCHED_DEEPGEMM"):
        assert (
            f"compiled at the first call by {compiler}, which is not there; install"
            in (states(PLATFORMS["h100"], **given)[name]["lacks"])
        )
        assert states(PLATFORMS["h100"], DG_JIT_USE_NVRTC="1", **given)[name]["lacks"] == ""
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    assert states(PLATFORMS["h100"], **given)["DEEPGEMM"]["lacks"] == ""


def test_the_other_recipe_of_a_backend_is_told_as_check_takes_it() -> None:
    text = run("platform").stdout
    rows = states(PLATFORMS["h100"])
    told = {(name, what, place) for name, row in rows.items() for what, place in row.get("variants", {}).items()}
    assert {name for name, _, _ in told} == {"DEEPGEMM", "BATCHED_DEEPGEMM"}
    for name, what, place in told:
        assert f"{name} with {what}: fp8moe check {place}\n" in text
        cls = load_subject(place).experts_cls
        assert issubclass(cls, LibraryBackend)
        assert (cls.backend.name, cls.variants) == (name, {})


def test_trtllm_without_flashinfer_is_said_to_lack_it() -> None:
    row = states(PLATFORMS["b200"].with_libraries())["FLASHINFER_TRTLLM"]
    assert row["takes_device"]
    assert row["lacks"].startswith("flashinfer is missing")


def test_a_variable_that_cannot_be_read_is_told() -> None:
    row = states(PLATFORMS["h100"], VLLM_USE_DEEP_GEMM="maybe")["DEEPGEMM"]
    assert row["takes_device"] is None
    assert "VLLM_USE_DEEP_GEMM='maybe'" in row["lacks"]


# -- explain --


@pytest.mark.parametrize(
    ("arguments", "backend", "rule"),
    [
        (["--platform", "h100"], "FLASHINFER_CUTLASS", "R8"),
        (["--platform", "b200"], "FLASHINFER_TRTLLM", "R8"),
        (["--platform", "h100", "--libraries", "none"], "TRITON", "R8"),
        (["--platform", "h100", "--libraries", "deep_gemm"], "DEEPGEMM", "R8"),
        (["--platform", "h100", "--libraries", "deep-gemm, vllm"], "DEEPGEMM", "R8"),
        (["--platform", "l40s"], "TRITON", "R8"),
        (["--platform", "a100"], "MARLIN", "R8"),
        (["--platform", "mi300x"], "TRITON", "R8"),
        (["--platform", "MI300X", "--env", "VLLM_ROCM_USE_AITER=1"], "AITER", "R6b"),
        (["--platform", "cpu"], "NONE", "R9"),
        (["--platform", "cpu", "--lora"], "TRITON", "R1"),
        (["--platform", "pvc", "--scheme", "tensor_dyn"], "XPU", "R8"),
        (["--platform", "h100", "--format", "batched"], "BATCHED_DEEPGEMM", "R8"),
        (["--platform", "h100", "--scheme", "channel-tok", "--allow-vllm-cutlass"], "VLLM_CUTLASS", "R8"),
        (["--platform", "h100", "--scheme", "channel-tok"], "TRITON", "R8"),
        (["--platform", "b200", "--routing", "default"], "DEEPGEMM", "R8"),
        (["--platform", "b200", "--eplb"], "DEEPGEMM", "R8"),
        (["--platform", "b200", "--routing", "renormalize", "--logits-dtype", "float32"], "DEEPGEMM", "R8"),
        (["--platform", "h100", "--activation", "gelu"], "TRITON", "R8"),
        (["--platform", "h100", "--scheme", "none", "--activation", "relu2_no_mul"], "FLASHINFER_CUTLASS", "R8"),
        (["--platform", "h100", "--env", "VLLM_TEST_FORCE_FP8_MARLIN=1"], "MARLIN", "R5"),
        (
            [
                *("--platform", "h100", "--env", "VLLM_USE_FLASHINFER_MOE_FP8=0"),
                *("--env", "VLLM_USE_DEEP_GEMM=0", "--env", "VLLM_TEST_FORCE_FP8_MARLIN="),
            ],
            "TRITON",
            "R8",
        ),
        (["--platform", "h100", "--tp", "2", "--dp", "2", "--ep"], "DEEPGEMM", "R8"),
        (["--platform", "h100", "--tp", "2", "--dp", "2", "--ep", "--all2all", "pplx"], "BATCHED_DEEPGEMM", "R8"),
        (["--platform", "h100", "--model", "glm-4.5", "--allow-vllm-cutlass"], "VLLM_CUTLASS", "R8"),
        (["--platform", "b200", "--model", "deepseek-v3:ep64"], "FLASHINFER_TRTLLM", "R8"),
    ],
)
def test_explain(arguments: list[str], backend: str, rule: str) -> None:
    answer = explain(*arguments)
    assert (answer["backend"], answer["rule"]) == (backend, rule)
    assert answer["error"] is None
    text = run("explain", *arguments).stdout
    assert f"choice: {backend}, by rule {rule}" in text
    for name in SEED_NAMES:
        assert name in text


def test_explain_json_keys_are_stable() -> None:
    answer = explain("--platform", "h100", "--model", "qwen3-30b-a3b", "--env", "VLLM_USE_DEEP_GEMM=0")
    assert list(answer) == [
        "format",
        "platform",
        "question",
        "rule",
        "backend",
        "experts_cls",
        "error",
        "verdicts",
        "plug_ins_that_do_not_load",
    ]
    assert answer["format"] == 1
    assert answer["platform"] == {
        "name": "h100",
        "kind": "cuda",
        "architecture": "sm90",
        "capability": [9, 0],
        "gcn_arch": None,
        "cuda_version": [12, 9],
        "libraries": ["deep_gemm", "flashinfer", "vllm"],
    }
    model = MODELS["qwen3-30b-a3b"]
    question = answer["question"]
    assert (question["num_experts"], question["hidden_dim"]) == (model.experts, model.hidden)
    assert question["intermediate_size_per_partition"] == model.inter
    assert question["weight_key"] == "kFp8Static128BlockSym"
    assert question["environment"] == {"VLLM_USE_DEEP_GEMM": "0"}
    assert [verdict["backend"] for verdict in answer["verdicts"]] == SEED_NAMES
    deep_gemm = answer["verdicts"][SEED_NAMES.index("DEEPGEMM")]
    assert deep_gemm["reason"] == "DISABLED_BY_ENV"
    assert set(deep_gemm) == {"backend", "supported", "reason", "detail", "consulted"}


def test_each_model_scheme_and_exchange_can_be_asked_about() -> None:
    for name, model in MODELS.items():
        for split in ("", *(f":{split}" for split in model.splits)):
            answer = explain("--platform", "h100", "--model", name + split)
            assert answer["question"]["model"] == name
            assert answer["question"]["routing"] == model.routing_method.name
    for scheme in SCHEMES:
        assert explain("--platform", "h100", "--scheme", scheme)["question"]["scheme"] == scheme
    for exchange in ALL2ALL_BACKENDS:
        explain("--platform", "h100", "--dp", "2", "--ep", "--all2all", exchange)


def test_sizes_take_the_models_place() -> None:
    sizes = ("--experts", "16", "--top-k", "1", "--hidden", "512", "--intermediate", "1024", "--tp", "4")
    question = explain("--platform", "h100", *sizes)["question"]
    assert question["model"] is None
    assert (question["num_experts"], question["experts_per_token"], question["hidden_dim"]) == (16, 1, 512)
    assert question["intermediate_size_per_partition"] == 256
    question = explain("--platform", "h100", *sizes, "--ep")["question"]
    assert question["num_local_experts"] == 4
    assert question["intermediate_size_per_partition"] == 1024


def test_a_split_of_a_model() -> None:
    parallel = explain("--platform", "h100", "--model", "deepseek-v3:ep64r3")["question"]["parallel"]
    assert (parallel["ep_size"], parallel["ep_rank"], parallel["use_ep"]) == (64, 3, True)
    parallel = explain("--platform", "h100", "--model", "deepseek-v3:tp8r1")["question"]["parallel"]
    assert (parallel["tp_size"], parallel["tp_rank"], parallel["use_ep"]) == (8, 1, False)
    parallel = explain("--platform", "h100", "--model", "deepseek-v3:dp16r2")["question"]["parallel"]
    assert (parallel["dp_size"], parallel["dp_rank"], parallel["ep_size"]) == (16, 2, 16)


def test_the_process_variables_count_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_FLASHINFER_MOE_FP8", "0")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "elsewhere")
    assert explain("--platform", "h100")["backend"] == "DEEPGEMM"
    assert explain("--platform", "h100")["question"]["environment"] == {"VLLM_USE_FLASHINFER_MOE_FP8": "0"}
    assert explain("--platform", "h100", "--clean-env")["backend"] == "FLASHINFER_CUTLASS"
    assert explain("--platform", "h100", "--env", "VLLM_USE_FLASHINFER_MOE_FP8=1")["rule"] == "R3c"
    assert "VLLM_USE_FLASHINFER_MOE_FP8='0'" in run("explain", "--platform", "h100").stdout


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--platform", "w7900"], "NoBackendFits", "no FP8 MoE backend"),
        (["--platform", "h100", "--env", "VLLM_ROCM_USE_AITER=1"], "BackendNotSupported", "AITER"),
        (["--platform", "h100", "--env", "VLLM_USE_DEEP_GEMM=x"], "MalformedVariable", "VLLM_USE_DEEP_GEMM='x'"),
        (["--platform", "cpu", "--env", "VLLM_USE_FLASHINFER_MOE_FP8=1"], "NoBackendFits", "FlashInfer"),
        (
            [
                "--platform",
                "b200",
                "--env",
                "VLLM_USE_FLASHINFER_MOE_FP8=1",
                "--env",
                "VLLM_FLASHINFER_MOE_BACKEND=fast",
            ],
            "MalformedVariable",
            "VLLM_FLASHINFER_MOE_BACKEND='fast'",
        ),
    ],
)
def test_exit_status_2_where_selection_raises(arguments: list[str], error: str, text: str) -> None:
    answer = explain(*arguments, status=2)
    assert answer["backend"] is None
    assert answer["error"]["type"] == error
    assert text in answer["error"]["text"]
    result = run("explain", *arguments, status=2)
    assert result.stderr.startswith(f"{error}: ")
    assert text in result.stderr
    assert "choice: an error" in result.stdout


def test_here_is_the_default() -> None:
    result = CliRunner().invoke(cli.app, ["explain", "--json"])
    assert json.loads(result.stdout)["platform"]["name"] == "here"


def test_all_platforms() -> None:
    text = run("explain", "--all-platforms").stdout
    for name in PLATFORMS:
        assert f" {name} " in text
    answers = explain("--all-platforms", "--libraries", "none")
    assert [answer["platform"]["name"] for answer in answers] == list(PLATFORMS)
    chosen = {answer["platform"]["name"]: answer["backend"] for answer in answers}
    assert chosen["h100"] == chosen["mi300x"] == "TRITON"
    assert chosen["cpu"] == "NONE"
    assert chosen["w7900"] is None


# -- repro --


def test_repro_hands_over_and_returns_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def reproduced(*asking: Any) -> int:
        asked.append(asking)
        return len(asked)

    given = SimpleNamespace(Given=lambda *options: options, reproduced=reproduced)
    monkeypatch.setitem(sys.modules, "fp8moe.commands.repro", given)
    run("repro", "v1:M=3", status=1)
    run(
        "repro",
        "v1:M=3,seed=2",
        "--backend",
        "acme.moe:Acme",
        "--device",
        "cpu",
        "--check",
        "relation.poison",
        status=2,
    )
    assert asked == [
        ("v1:M=3", (None, None, None, None, None, None, False, None, False)),
        ("v1:M=3,seed=2", ("acme.moe:Acme", "cpu", "relation.poison", None, None, None, False, None, False)),
    ]
