"""Our selector beside vLLM's, on a vLLM that is played: agreement, planted disagreements, refusals, missing names."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fp8moe_vllm import answers, selection, shrunk, simulated
from fp8moe_vllm.drawn import drawn
from fp8moe_vllm.question import USUAL, call_of, can_be_put, parse, parts_of, told
from fp8moe_vllm.theirs import Theirs, environment

from conformance.selection.model import RULES
from fp8moe import Platform
from fp8moe.quant import kFp8StaticTensorSym
from fp8moe.registry import BackendUnavailable, Reason
from tests.vendors import played_vllm
from tests.vendors.played_vllm import LAYERS, QUANT, FaultyAnswer

Modules = dict[str, ModuleType]


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


def installed(monkeypatch: pytest.MonkeyPatch, version: str = "0.16.0", fault: FaultyAnswer | None = None) -> Modules:
    found = played_vllm.modules(version, fault)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def allows_always(call: tuple[Any, ...], platform: Platform) -> tuple[Any, ...]:
    """The fault that R7 is forgotten."""
    return (*call[:3], True)


def test_one_that_is_the_same_agrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = installed(monkeypatch)
    held = {name: dict(vars(module)) for name, module in found.items()}
    before = dict(os.environ)
    assert selection.main(["--cases", "400", "--seed", "3", "--out", str(tmp_path / "x.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vllm 0.16.0 beside fp8moe's selector, simulated platforms"
    assert [line.split()[0] for line in lines[2:13]] == [*RULES, "all"]
    assert lines[12].split() == ["all", "400", "400", "0"]
    assert all(int(line.split()[1]) > 0 for line in lines[2:12])
    assert re.match(
        r"lists shortened on the way: R3a \d+, R4a \d+, R6a \d+, R7 \d+; \d\d different answers of vLLM's$", lines[13]
    )
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["command"].startswith("python -m fp8moe_vllm.selection --cases 400 --seed 3")
    assert (written["versions"]["vllm"], written["agreed"], written["apart"], written["kinds"]) == (
        "0.16.0",
        400,
        0,
        [],
    )
    assert dict(os.environ) == before
    for name, module in found.items():  # and everything is as it was
        assert all(vars(module)[own] is value for own, value in held[name].items()), name


def test_a_planted_disagreement_is_found_and_made_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    installed(monkeypatch, fault=allows_always)
    assert selection.main(["--cases", "600", "--out", str(tmp_path / "x.json")]) == 1
    out = capsys.readouterr().out
    kinds = json.loads((tmp_path / "x.json").read_text())["kinds"]
    assert kinds
    for kind in kinds:
        parts = json.loads(kind["ask"])
        assert {"allow_vllm_cutlass"}.isdisjoint(parts)  # the usual one is the one that tells
        assert len(parts) <= 5, kind
    assert {kind["vllm"] for kind in kinds} <= {f"{name}VLLM_CUTLASS with its class" for name in ("", "BATCHED_")}
    line = next(line for line in out.splitlines() if "--ask" in line)
    again = shlex.split(line)
    assert again[:3] == ["python", "-m", "fp8moe_vllm.selection"]
    assert selection.main(again[3:]) == 1
    assert re.search(r"ours +\w+ with its class \(R8\)\nvLLM +\w+ with its class", capsys.readouterr().out)
    assert selection.main(["--ask", "{}"]) == 0


@pytest.mark.parametrize("version", ["0.25.1", "dev"])
def test_another_version_is_refused_but_anyway(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, version, allows_always)
    assert selection.main(["--cases", "50"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"found vllm {version}; the specification restates 0.16.0" in told.err
    assert "vllm==0.16.0" in told.err
    assert "--anyway" in told.err
    assert selection.main(["--cases", "600", "--anyway"]) == 1
    out = capsys.readouterr().out
    assert f"vllm {version}" in out.splitlines()[0]
    assert "(another version: differences are expected)" in out.splitlines()[0]
    assert "selection --anyway --ask" in out


def test_a_build_of_the_release_is_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.16.0+cu129")
    assert selection.main(["--ask", "{}"]) == 0


def test_without_vllm_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert selection.main(["--cases", "5"]) == 2
    assert "vllm is not installed; install vllm==0.16.0" in capsys.readouterr().err
    folder = ModuleType("vllm")
    folder.__file__ = None
    monkeypatch.setitem(sys.modules, "vllm", folder)
    assert selection.main(["--cases", "5"]) == 2
    assert "vllm is not installed" in capsys.readouterr().err


NAMES = [
    ("vllm", "__version__"),
    (f"{LAYERS}.oracle.fp8", "select_fp8_moe_backend"),
    (f"{LAYERS}.oracle.fp8", "backend_to_kernel_cls"),
    (f"{LAYERS}.oracle.fp8", "Fp8MoeBackend"),
    (f"{LAYERS}.config", "FusedMoEConfig"),
    (f"{LAYERS}.config", "FusedMoEParallelConfig"),
    (f"{LAYERS}.config", "RoutingMethodType"),
    (QUANT, "QuantKey"),
    (QUANT, "ScaleDesc"),
    (QUANT, "GroupShape"),
    (QUANT, "FP8_DTYPE"),
    ("vllm.envs", "disable_envs_cache"),
    ("vllm._aiter_ops", "rocm_aiter_ops"),
    ("vllm._aiter_ops", "IS_AITER_FOUND"),
    ("vllm._custom_ops", "torch"),
    ("vllm._custom_ops", "cutlass_group_gemm_supported"),
    ("vllm.platforms", "current_platform"),
    ("vllm.platforms", "PlatformEnum"),
    ("vllm.platforms.interface", "Platform"),
    ("vllm.platforms.interface", "DeviceCapability"),
    ("vllm.platforms.cuda", "CudaPlatformBase"),
    ("vllm.platforms.rocm", "RocmPlatform"),
    ("vllm.platforms.xpu", "XPUPlatform"),
    ("vllm.platforms.cpu", "CpuPlatform"),
    ("vllm.platforms.rocm", "on_gfx9"),
    ("vllm.utils.flashinfer", "has_flashinfer_cutlass_fused_moe"),
    ("vllm.utils.flashinfer", "has_flashinfer_trtllm_fused_moe"),
    ("vllm.utils.deep_gemm", "has_deep_gemm"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_name_that_is_not_there_ends_it(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = installed(monkeypatch)
    held = dict(vars(found["vllm._aiter_ops"]))
    delattr(found[module], name)
    assert selection.main(["--cases", "5"]) == 2
    assert f"{module} has no {name}" in capsys.readouterr().err
    if module != "vllm._aiter_ops":
        assert dict(vars(found["vllm._aiter_ops"])) == held


def test_names_of_another_layout_and_fields_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = installed(monkeypatch)
    del found["vllm.platforms.rocm"]._get_gcn_arch_via_amdsmi
    assert selection.main(["--cases", "5"]) == 2
    assert "vllm.platforms.rocm has no _GCN_ARCH" in capsys.readouterr().err
    found = installed(monkeypatch)
    found[f"{LAYERS}.config"].FusedMoEConfig = played_vllm.Parallel  # type: ignore[attr-defined]
    assert selection.main(["--cases", "5"]) == 2
    assert "vLLM's FusedMoEParallelConfig has no num_experts" in capsys.readouterr().err
    found = installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm.utils.deep_gemm", None)
    assert selection.main(["--cases", "5"]) == 2
    assert "vllm.utils.deep_gemm does not load" in capsys.readouterr().err


def private_memo(found: Modules) -> None:
    kept: list[bool] = []

    def asked_once() -> bool:
        kept.append(found["vllm.utils.deep_gemm"].has_deep_gemm())
        return kept[0]

    found["vllm.utils.deep_gemm"].is_deep_gemm_supported = asked_once  # type: ignore[attr-defined]


def private_platform(found: Modules) -> None:
    found[f"{LAYERS}.flashinfer_cutlass_moe"].current_platform = played_vllm.PlayedPlatform()  # type: ignore[attr-defined]


def without_refresh(found: Modules) -> None:
    found["vllm._aiter_ops"].rocm_aiter_ops.refresh_env_variables = classmethod(lambda cls: None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "what"),
    [(private_memo, "DeepGEMM"), (private_platform, "a CUDA device"), (without_refresh, "AITER")],
)
def test_a_probe_that_is_not_asked_ends_it(
    change: Any, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(installed(monkeypatch))
    assert selection.main(["--cases", "5"]) == 2
    assert f"answers the same with and without {what}:" in capsys.readouterr().err


def test_here_nothing_is_put_in_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = installed(monkeypatch)
    monkeypatch.setattr(Platform, "detect", staticmethod(lambda: Platform("cpu", libraries=frozenset({"vllm"}))))
    monkeypatch.setattr(simulated, "Simulated", None)
    for name in ("vllm.platforms.interface", "vllm.platforms.cuda", "vllm.utils.flashinfer"):
        monkeypatch.delitem(sys.modules, name)  # not even looked at
    assert selection.main(["--cases", "200", "--here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vllm 0.16.0 beside fp8moe's selector, the device here"
    assert lines[12].split() == ["all", "200", "200", "0"]
    assert found["vllm._aiter_ops"].IS_AITER_FOUND is False
    # a device that is another than ours takes it for is found, and the question says nothing of a platform
    monkeypatch.setattr(Platform, "detect", staticmethod(lambda: Platform("rocm", gcn_arch="gfx942")))
    assert selection.main(["--cases", "200", "--here"]) == 1
    out = capsys.readouterr().out
    assert "selection --here --ask '{}'" in out
    assert '"kind"' not in out


def test_here_what_was_remembered_of_the_variables_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(monkeypatch)
    with environment({}):
        Theirs()
    supported = found["vllm.utils.deep_gemm"].is_deep_gemm_supported
    with simulated.here() as forget:
        assert not supported()
        assert supported.cache_info().currsize == 1
        forget()
        assert supported.cache_info().currsize == 0


def test_questions_are_the_seeds_all_different_and_come_back_from_their_line() -> None:
    found = list(drawn(300, 5))
    lines = [told(parts) for parts in found]
    assert len(set(lines)) == 300
    assert lines == [told(parts) for parts in drawn(300, 5)]
    assert lines != [told(parts) for parts in drawn(300, 6)]
    assert [parse(line) for line in lines] == found
    for parts in found:
        call = call_of(parts)
        assert parts_of(call) == parts
        assert call.platform.has("vllm")
        assert can_be_put(call.env)
        assert "PATH" not in call.env
    assert {answers.explained(call_of(parts)).rule for parts in found} == set(RULES)
    assert told(USUAL) == "{}"
    assert not can_be_put({"X": "\0"})


@pytest.mark.parametrize(
    "text", ["x", "[]", '{"colour": 1}', '{"weight_key": "kNone"}', '{"use_ep": true, "tp_size": 2}', '{"env": 1}']
)
def test_lines_that_are_no_question(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        selection.main(["--ask", text])
    assert "fp8moe_vllm.selection: error" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        selection.main(["--cases", "0"])


def test_shrinking_ends_and_keeps_what_matters() -> None:
    for parts in islice((one for one in drawn(400, 1) if one["env"]), 40):
        name = sorted(parts["env"])[0]
        small = shrunk.shrink(parts, lambda one, name=name: name in one["env"] and _is_call(one))
        assert small.keys() == USUAL.keys()
        assert {own: value for own, value in small.items() if value != USUAL[own]}.keys() == {"env"}
        assert list(small["env"]) == [name]
        assert len(small["env"][name]) <= 1 or small["env"] == {name: parts["env"][name]}
    everything = shrunk.shrink(next(drawn(1, 2)), lambda parts: True)
    assert everything == USUAL


def _is_call(parts: dict[str, Any]) -> bool:
    try:
        call_of(parts)
    except ValueError:
        return False
    return True


def test_shrinking_never_takes_a_step_back() -> None:
    order: list[tuple[int, int, int]] = []

    def fails(parts: dict[str, Any]) -> bool:
        order.append(shrunk.size(parts))
        return len(order) % 3 == 0

    shrunk.shrink(max(drawn(50, 4), key=shrunk.size), fails)
    taken = order[2::3]
    assert taken == sorted(taken, reverse=True)


REFUSED = "FP8 MoE backend AITER does not support the deployment configuration since kernel does not support"


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        *[
            (ValueError(f"{REFUSED} {token}."), answers.refused("AITER", reason.name))
            for reason, token in played_vllm.TOKENS.items()
        ],
        (ValueError(f"{REFUSED} ('batched_experts',) activation format."), answers.refused("AITER", "FORMAT")),
        (ValueError(f"{REFUSED} \n activation."), answers.refused("AITER", "ACTIVATION")),
        (ValueError(f"{REFUSED} current device cuda."), answers.refused("AITER", "DEVICE")),
        (ValueError(f"{REFUSED} music."), answers.refused("AITER", "kernel does not support music")),
        (ValueError("FlashInfer MaskedGEMM not supported for FP8"), answers.MASKED_GEMM),
        (ValueError("Invalid value 'a' b' for VLLM_X. Valid options: ['c']."), 'ValueError: VLLM_X is not "a\' b"'),
        (ValueError("something else"), "ValueError: something else"),
        (NotImplementedError(), "NotImplementedError: "),
        (NotImplementedError("No FP8 MoE backend supports the deployment configuration."), answers.NOTHING_FITS),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_what_vllm_raises_in_our_words(error: Exception, answer: str) -> None:
    assert answers.answer_of_vllm(error) == answer


@pytest.mark.parametrize("text", ["", "x", " 1.0 ", "'", "\n"])
def test_a_malformed_integer_is_the_same_in_both(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int(text)
    own = answers.ours(call_of(USUAL | {"env": {"VLLM_USE_DEEP_GEMM": text}}))
    assert answers.answer_of_vllm(caught.value) == own
    assert answers.kind(own) == "ValueError: no integer"


def test_a_choice_that_is_none_is_the_same_in_both() -> None:
    env = {"VLLM_USE_FLASHINFER_MOE_FP8": "1", "VLLM_FLASHINFER_MOE_BACKEND": "it's\nlate"}
    own = answers.ours(call_of(USUAL | {"env": env}))
    said = f"Invalid value '{env['VLLM_FLASHINFER_MOE_BACKEND']}' for VLLM_FLASHINFER_MOE_BACKEND. Valid options: []."
    assert answers.answer_of_vllm(ValueError(said)) == own
    assert answers.kind(own) == "ValueError: VLLM_FLASHINFER_MOE_BACKEND is no choice"
    assert answers.kind(answers.NOTHING_FITS) == answers.NOTHING_FITS


def test_reasons_are_all_known() -> None:
    known = Counter(reason for _, reason in answers.TOKENS)
    assert set(known) == set(Reason) - {Reason.DISABLED_BY_ENV, Reason.NOT_ALLOWED}


def test_keys_on_a_device_of_fnuz_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)[QUANT].FP8_DTYPE = torch.float8_e4m3fnuz  # type: ignore[attr-defined]
    key = Theirs().key(kFp8StaticTensorSym)
    assert (key.dtype, key.scale.dtype) == (torch.float8_e4m3fnuz, torch.float32)


def test_a_class_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(monkeypatch)

    def broken(backend: Any) -> type:
        raise ImportError("no kernels")

    found[f"{LAYERS}.oracle.fp8"].backend_to_kernel_cls = broken  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailable, match=r"the class of NONE does not load \(ImportError: no kernels\)"):
        Theirs()
