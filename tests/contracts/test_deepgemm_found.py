"""Where DEEPGEMM's library is found: an installed one, or the copy inside vLLM, which is not imported."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.build import build
from fp8moe import PLATFORMS, BackendUnavailable
from fp8moe.backends import batched_deepgemm
from fp8moe.backends.deepgemm_stages import DeepGemmStages
from tests.contracts.layers import case


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed vLLM that must not be imported, with a copy of DeepGEMM that imports a part of its own."""
    copy = tmp_path / "vllm" / "third_party" / "deep_gemm"
    copy.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('vllm was imported')\n")
    (copy / "part.py").write_text("def m_grouped_fp8_gemm_nt_masked(): ...\n")
    (copy / "__init__.py").write_text("from .part import *\nimport deep_gemm.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(DeepGemmStages, "platform", lambda self: PLATFORMS["h200"])
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", sys.executable)
    yield copy
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_gemm"]:
        del sys.modules[name]


def batched() -> batched_deepgemm.BatchedDeepGemmExperts:
    tensors = build(case("block"), "cpu")
    return batched_deepgemm.BatchedDeepGemmExperts(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="another deep_gemm is installed")
def test_the_copy_inside_vllm_serves_without_vllm(vllm: Path) -> None:
    assert batched().deep_gemm.__file__ == str(vllm / "__init__.py")
    assert batched().deep_gemm is sys.modules["deep_gemm"]


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="another deep_gemm is installed")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("assert None is not None", "does not load (AssertionError: no text); install a DeepGEMM"),
        ("", "__init__.py) has no m_grouped_fp8_gemm_nt_masked: another version; install a DeepGEMM"),
    ],
)
def test_a_copy_that_cannot_be_used_is_told(vllm: Path, content: str, why: str) -> None:
    (vllm / "__init__.py").write_text(content)
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        batched()


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="another deep_gemm is installed")
@pytest.mark.usefixtures("vllm")
def test_a_compiler_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", "no-such-nvcc")
    why = "compiled at the first call by no-such-nvcc, which is not there; install the CUDA toolkit"
    with pytest.raises(BackendUnavailable, match=why):
        batched()


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="deep_gemm is installed")
def test_without_a_library_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepGemmStages, "platform", lambda self: PLATFORMS["h200"])
    with pytest.raises(BackendUnavailable, match="deep_gemm does not load"):
        batched()
