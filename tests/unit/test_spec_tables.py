"""The executed tables of the selector's specification (sections 1.5, 1.6, 2.5 and its extra points), cell by cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conformance.selection.axes import SCHEMES
from conformance.selection.build import BATCHED, SINGLE, make_config, make_parallel
from fp8moe import (
    Fp8MoeBackend,
    FusedMoEActivationFormat,
    Platform,
    Reason,
    RoutingMethodType,
    explain_fp8_moe_backend,
    select_fp8_moe_backend,
)
from fp8moe.registry import default_backends

MATRIX = json.loads((Path(__file__).parent.parent / "data" / "selection_tables.json").read_text(encoding="utf-8"))

FLASHINFER, FLASHINFER_BACKEND = "VLLM_USE_FLASHINFER_MOE_FP8", "VLLM_FLASHINFER_MOE_BACKEND"
DEEP_GEMM, MOE_DEEP_GEMM = "VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM"
MARLIN = "VLLM_TEST_FORCE_FP8_MARLIN"
AITER, AITER_MOE = "VLLM_ROCM_USE_AITER", "VLLM_ROCM_USE_AITER_MOE"


def platform(name: str, *libraries: str) -> Platform:
    """A platform of the tables; vLLM's compiled operators are always there."""
    have = frozenset({"vllm", *libraries})
    if name.startswith("sm"):
        return Platform("cuda", capability=divmod(int(name[2:]), 10), cuda_version=(12, 9), libraries=have)
    if name.startswith("gfx"):
        return Platform("rocm", gcn_arch=name, libraries=have)
    return Platform(name, libraries=have)


def answer(scheme: str, on: Platform, env: dict[str, str], *, allow: bool = False, **config: Any) -> str:
    """The chosen backend's value, or the exception: E:backend:REASON, ValueError naming a variable, or its type."""
    try:
        backend, _ = select_fp8_moe_backend(make_config(**config), *SCHEMES[scheme], allow, platform=on, env=env)
    except NotImplementedError as error:
        return "NIE" if f"{FLASHINFER}=1" in str(error) else "NotImplementedError"
    except ValueError as error:
        if getattr(error, "backend", None) is not None:
            named = error.backend.value if error.backend.value in str(error) else "a text without the backend"
            return f"E:{named}:{error.reason.name}"
        named = [name for name in (FLASHINFER, FLASHINFER_BACKEND, DEEP_GEMM, MOE_DEEP_GEMM) if name in str(error)]
        if "masked" in str(error).lower() and "FP8" in str(error):
            return "no masked GEMM"
        return f"malformed {named[0]}"
    return backend.value


def matrix_cells() -> list[Any]:
    cells = []
    for table in MATRIX["tables"]:
        libraries = [name for name in ("deep_gemm", "flashinfer") if table[name]]
        title = "+".join(libraries) or "no_libraries"
        for name, row in table["rows"].items():
            for scheme, expected in zip(MATRIX["schemes"], row, strict=True):
                allow = table["allow_vllm_cutlass"]
                cell = f"{title}-{'allowed' if allow else 'not_allowed'}-{table['format']}-{name}-{scheme}"
                cells.append(pytest.param(libraries, allow, table["format"], name, scheme, expected, id=cell))
    return cells


@pytest.mark.parametrize(("libraries", "allow", "format_", "name", "scheme", "expected"), matrix_cells())
def test_executed_matrix(
    libraries: list[str], allow: bool, format_: str, name: str, scheme: str, expected: str
) -> None:
    parallel = BATCHED if format_ == "batched" else SINGLE
    assert answer(scheme, platform(name, *libraries), {}, allow=allow, parallel=parallel) == expected


def test_the_matrix_is_whole() -> None:
    assert len(matrix_cells()) == 8 * 12 * 9


@pytest.mark.parametrize("scheme", MATRIX["schemes"])
def test_aiter_in_the_library_set_changes_no_row_of_gfx942(scheme: str) -> None:
    expected = MATRIX["tables"][0]["rows"]["gfx942"][MATRIX["schemes"].index(scheme)]
    assert answer(scheme, platform("gfx942", "aiter", "deep_gemm", "flashinfer"), {}) == expected


# Section 2.5, "Extra points".
HIGH_THROUGHPUT = {"exchange": "deepep_high_throughput", "dp": 2}
EXTRA = {
    "sm90-block-without-flashinfer": ("sm90", ["deep_gemm"], "block", {}, "DEEPGEMM"),
    "sm100-tensor_static-renormalize-without-flashinfer": (
        "sm100",
        ["deep_gemm"],
        "tensor_static",
        {"routing": RoutingMethodType.Renormalize},
        "FLASHINFER_TRTLLM",
    ),
    "sm90-block-ht-tp1-dp2-ep": (
        "sm90",
        ["deep_gemm", "flashinfer"],
        "block",
        {"parallel": make_parallel(ep=2, use_ep=True, **HIGH_THROUGHPUT)},
        "FLASHINFER_CUTLASS",
    ),
    "sm90-block-ht-tp2-dp2-ep-without-sp": (
        "sm90",
        ["deep_gemm", "flashinfer"],
        "block",
        {"parallel": make_parallel(ep=4, use_ep=True, **HIGH_THROUGHPUT)},
        "FLASHINFER_CUTLASS",
    ),
    "sm90-block-ht-tp2-dp2-ep-with-sp": (
        "sm90",
        ["deep_gemm", "flashinfer"],
        "block",
        {"parallel": make_parallel(ep=4, use_ep=True, sequence_parallel=True, **HIGH_THROUGHPUT)},
        "DEEPGEMM",
    ),
    "sm90-block-ht-tp2-dp2-without-ep": (
        "sm90",
        ["deep_gemm", "flashinfer"],
        "block",
        {"parallel": make_parallel(tp=4, **HIGH_THROUGHPUT)},
        "FLASHINFER_CUTLASS",
    ),
} | {
    f"sm100-block-{routing.name}-{title}": ("sm100", libraries, "block", {"routing": routing}, expected)
    for routing in (
        RoutingMethodType.Default,
        RoutingMethodType.Llama4,
        RoutingMethodType.TopK,
        RoutingMethodType.Custom,
        RoutingMethodType.Simulated,
        RoutingMethodType.Unspecified,
    )
    for title, libraries, expected in (
        ("with-deep_gemm", ["deep_gemm", "flashinfer"], "DEEPGEMM"),
        ("without-deep_gemm", ["flashinfer"], "TRITON"),
    )
}


@pytest.mark.parametrize("point", EXTRA)
def test_extra_point(point: str) -> None:
    name, libraries, scheme, config, expected = EXTRA[point]
    assert answer(scheme, platform(name, *libraries), {}, **config) == expected


# Section 1.6: block scheme, DeepSeekV3 routing, standard format, FlashInfer and DeepGEMM installed, AITER on gfx942.
COLUMNS = ("sm90", "sm100", "sm89", "gfx942", "cpu")
AS_NONE = ("FLASHINFER_CUTLASS", "FLASHINFER_TRTLLM", "TRITON", "TRITON", "NONE")
TRITON_ROW = ("TRITON", "TRITON", "TRITON", "TRITON", "NONE")
FLASHINFER_ROW = ("FLASHINFER_CUTLASS", "FLASHINFER_TRTLLM", "NIE", "NIE", "NIE")
NO_CUTLASS, NO_DEEPGEMM, NO_MARLIN, NO_AITER = (
    f"E:{name}:DEVICE" for name in ("FLASHINFER_CUTLASS", "DEEPGEMM", "MARLIN", "AITER")
)
DEEPGEMM_ROW = ("DEEPGEMM", "DEEPGEMM", NO_DEEPGEMM, NO_DEEPGEMM, NO_DEEPGEMM)
MARLIN_ROW = ("MARLIN", "MARLIN", "MARLIN", NO_MARLIN, NO_MARLIN)
CONFLICTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "none": ({}, AS_NONE),
    "flashinfer=0": ({FLASHINFER: "0"}, ("DEEPGEMM", "DEEPGEMM", "TRITON", "TRITON", "NONE")),
    "flashinfer=1": ({FLASHINFER: "1"}, FLASHINFER_ROW),
    "flashinfer=1,latency": (
        {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"},
        ("FLASHINFER_CUTLASS", "FLASHINFER_TRTLLM", NO_CUTLASS, NO_CUTLASS, NO_CUTLASS),
    ),
    "flashinfer=1,throughput": (
        {FLASHINFER: "1", FLASHINFER_BACKEND: "throughput"},
        ("FLASHINFER_CUTLASS", "E:FLASHINFER_CUTLASS:SCHEME", NO_CUTLASS, NO_CUTLASS, NO_CUTLASS),
    ),
    "flashinfer=1,masked_gemm": ({FLASHINFER: "1", FLASHINFER_BACKEND: "masked_gemm"}, ("no masked GEMM",) * 5),
    "backend=bogus": ({FLASHINFER_BACKEND: "bogus"}, AS_NONE),
    "deep_gemm=1": ({DEEP_GEMM: "1"}, DEEPGEMM_ROW),
    "moe_deep_gemm=1": ({MOE_DEEP_GEMM: "1"}, DEEPGEMM_ROW),
    "deep_gemm=0": ({DEEP_GEMM: "0"}, AS_NONE),
    "deep_gemm=1,moe=0": ({DEEP_GEMM: "1", MOE_DEEP_GEMM: "0"}, AS_NONE),
    "deep_gemm=0,moe=x": ({DEEP_GEMM: "0", MOE_DEEP_GEMM: "x"}, AS_NONE),
    "deep_gemm=1,moe=x": ({DEEP_GEMM: "1", MOE_DEEP_GEMM: "x"}, (f"malformed {MOE_DEEP_GEMM}",) * 5),
    "marlin=1": ({MARLIN: "1"}, MARLIN_ROW),
    "marlin=1,deep_gemm=1": ({MARLIN: "1", DEEP_GEMM: "1"}, DEEPGEMM_ROW),
    "marlin=1,aiter=1": ({MARLIN: "1", AITER: "1"}, MARLIN_ROW),
    "aiter=1": ({AITER: "1"}, (NO_AITER, NO_AITER, NO_AITER, "AITER", NO_AITER)),
    "aiter_moe=1": ({AITER_MOE: "1"}, AS_NONE),
    "flashinfer=1,deep_gemm=1": ({FLASHINFER: "1", DEEP_GEMM: "1"}, FLASHINFER_ROW),
    "flashinfer=0,deep_gemm=1": ({FLASHINFER: "0", DEEP_GEMM: "1"}, DEEPGEMM_ROW),
    "flashinfer=0,deep_gemm=0": ({FLASHINFER: "0", DEEP_GEMM: "0"}, TRITON_ROW),
    "flashinfer=empty,deep_gemm=0": ({FLASHINFER: "", DEEP_GEMM: "0"}, (f"malformed {FLASHINFER}",) * 5),
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", CONFLICTS)
def test_conflict(row: str, column: str) -> None:
    env, expected = CONFLICTS[row]
    libraries = ["flashinfer", "deep_gemm", *(["aiter"] if column == "gfx942" else [])]
    assert answer("block", platform(column, *libraries), env) == expected[COLUMNS.index(column)]


# Section 1.5: what a pair of variables does. "auto" leaves a backend in the list, "removed" takes it out.
UNSET = "unset"
DEEP_GEMM_PAIRS = {
    (UNSET, UNSET): "auto",
    (UNSET, "0"): "removed",
    (UNSET, "1"): "must-use",
    ("0", UNSET): "removed",
    ("0", "0"): "removed",
    ("0", "1"): "removed",
    ("1", UNSET): "must-use",
    ("1", "0"): "removed",
    ("1", "1"): "must-use",
}
AITER_PAIRS = DEEP_GEMM_PAIRS | {(UNSET, "1"): "removed"}
FLASHINFER_PAIRS = {
    **{(UNSET, choice): "auto" for choice in (UNSET, "throughput", "latency", "masked_gemm", "bogus")},
    **{("0", choice): "removed" for choice in (UNSET, "throughput", "latency", "masked_gemm", "bogus")},
    ("1", UNSET): "try both",
    ("2", UNSET): "try both",
    ("1", "throughput"): "must FLASHINFER_CUTLASS",
    ("1", "latency"): "must FLASHINFER_TRTLLM on SM10x",
    ("1", "masked_gemm"): "no masked GEMM",
    ("1", "bogus"): f"malformed {FLASHINFER_BACKEND}",
}


def pair_env(names: tuple[str, str], values: tuple[str, str]) -> dict[str, str]:
    return {name: value for name, value in zip(names, values, strict=True) if value != UNSET}


def removal(on: Platform, env: dict[str, str], backend: str) -> Reason | None:
    """The reason of a backend's verdict for the block scheme."""
    selection = explain_fp8_moe_backend(make_config(), *SCHEMES["block"], platform=on, env=env)
    return next(verdict.reason for verdict in selection.verdicts if verdict.backend.value == backend)


@pytest.mark.parametrize("values", DEEP_GEMM_PAIRS, ids="-".join)
def test_deep_gemm_pair(values: tuple[str, str]) -> None:
    env = pair_env((DEEP_GEMM, MOE_DEEP_GEMM), values)
    meaning = DEEP_GEMM_PAIRS[values]
    fits, does_not = platform("sm90", "deep_gemm"), platform("sm89", "deep_gemm")
    assert answer("block", fits, env) == ("TRITON" if meaning == "removed" else "DEEPGEMM")
    assert answer("block", does_not, env) == (NO_DEEPGEMM if meaning == "must-use" else "TRITON")
    assert removal(fits, env, "DEEPGEMM") is (Reason.DISABLED_BY_ENV if meaning == "removed" else None)


@pytest.mark.parametrize("values", DEEP_GEMM_PAIRS, ids="-".join)
def test_deep_gemm_class_needs_only_the_first_variable(values: tuple[str, str]) -> None:
    experts_cls = next(spec.experts_cls for spec in default_backends() if spec.name == "DEEPGEMM")
    supported = experts_cls.is_supported_config(
        experts_cls,
        make_config(),
        *SCHEMES["block"],
        FusedMoEActivationFormat.Standard,
        platform=platform("sm90", "deep_gemm"),
        env=pair_env((DEEP_GEMM, MOE_DEEP_GEMM), values),
    )
    assert supported == ((False, Reason.DEVICE) if values[0] == "0" else (True, None))


@pytest.mark.parametrize("values", AITER_PAIRS, ids="-".join)
def test_aiter_pair(values: tuple[str, str]) -> None:
    env = pair_env((AITER, AITER_MOE), values)
    meaning = AITER_PAIRS[values]
    fits, does_not = platform("gfx942", "aiter"), platform("sm89", "aiter")
    assert answer("block", fits, env) == ("AITER" if meaning == "must-use" else "TRITON")
    assert answer("block", does_not, env) == (NO_AITER if meaning == "must-use" else "TRITON")
    refused = {"auto": Reason.DEVICE, "removed": Reason.DISABLED_BY_ENV, "must-use": None}
    assert removal(fits, env, "AITER") is refused[meaning]


@pytest.mark.parametrize("values", FLASHINFER_PAIRS, ids="-".join)
def test_flashinfer_pair(values: tuple[str, str]) -> None:
    env = pair_env((FLASHINFER, FLASHINFER_BACKEND), values)
    meaning = FLASHINFER_PAIRS[values]
    expected = {
        "auto": ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "TRITON"),
        "removed": ("TRITON", "TRITON", "TRITON"),
        "try both": ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "NIE"),
        "must FLASHINFER_CUTLASS": ("E:FLASHINFER_CUTLASS:SCHEME", "FLASHINFER_CUTLASS", NO_CUTLASS),
        "must FLASHINFER_TRTLLM on SM10x": ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", NO_CUTLASS),
    }.get(meaning, (meaning,) * 3)
    platforms = [platform(name, "flashinfer") for name in ("sm100", "sm90", "sm89")]
    assert tuple(answer("block", on, env) for on in platforms) == expected


def test_latency_demands_trtllm_on_the_whole_sm10x_family_and_fails_there() -> None:
    env = {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"}
    for name in ("sm100", "sm103", "sm109"):
        assert answer("tensor_dyn", platform(name, "flashinfer"), env) == "E:FLASHINFER_TRTLLM:SCHEME"


def test_every_backend_of_the_matrix_exists() -> None:
    named = {value for table in MATRIX["tables"] for row in table["rows"].values() for value in row}
    assert named <= {backend.value for backend in Fp8MoeBackend} | {"NotImplementedError"}
