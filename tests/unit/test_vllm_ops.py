"""vLLM's compiled operators without vLLM: where they are looked for, and what is said when they cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp8moe.backends.vllm_ops import ARGUMENTS, operators
from fp8moe.libraries import VLLM_OPS, Surroundings, probe_libraries, vllm_operators
from fp8moe.registry import BackendUnavailable

FILES = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).write_text("no library")
    monkeypatch.setenv(VLLM_OPS, str(tmp_path))
    return tmp_path


def test_a_folder_that_is_named_counts_as_vllm(folder: Path) -> None:
    assert vllm_operators() == {"_C": folder / FILES[0], "_moe_C": folder / FILES[1]}
    (probe,) = [
        probe for probe in probe_libraries("cuda", Surroundings(env={VLLM_OPS: str(folder)})) if probe.name == "vllm"
    ]
    assert probe.present
    assert probe.detail == f"operators in {FILES[0]}, {FILES[1]} of {VLLM_OPS}={folder}"


def test_a_folder_without_both_is_told(folder: Path) -> None:
    (folder / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{VLLM_OPS}={folder} has no compiled _moe_C: expected both"):
        vllm_operators()
    with pytest.raises(BackendUnavailable, match=rf"X: {VLLM_OPS}=.* has no compiled _moe_C.*; install the vllm"):
        operators("X", {"_moe_C": ("no_such_operator",)})


def test_a_file_that_is_no_library_is_told(folder: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"X: .*_moe_C_stable_libtorch.abi3.so does not load \(.*\); install"):
        operators("X", {"_moe_C": ("no_such_operator",)})


def test_without_vllm_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VLLM_OPS, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendUnavailable, match=r"X: .*vllm.*; install the vllm that is built for torch .* or name"):
        operators("X", {"_C": ("no_such_operator",)})


@pytest.fixture
def registered() -> Iterator[str]:
    library = torch.library.Library("fp8moe_played_ops", "DEF")
    library.define("there(Tensor x) -> Tensor")
    yield "fp8moe_played_ops"
    library._destroy()


def test_what_is_registered_already_is_not_loaded_again(registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert operators("X", {registered: ("there",)}).there is torch.ops.fp8moe_played_ops.there


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("Tensor ids, int num_experts, int block_size", "takes 3 arguments, without topk_ids, .* and with ids"),
        ("{}, Tensor? scatter_idx=None", "takes 8 arguments, with scatter_idx"),
        ("{}", ""),
    ],
    ids=["other", "one more", "those of the release"],
)
def test_an_operator_with_other_arguments_is_another_versions(arguments: str, told: str) -> None:
    """As of vLLM 0.33, whose operators have the same names: they are refused before a call fails or means otherwise."""
    same = ", ".join(f"Tensor {name}" for name in ARGUMENTS["moe_align_block_size"].split())
    namespace = "fp8moe_played_arguments"
    library = torch.library.Library(namespace, "DEF")
    try:
        library.define(f"moe_align_block_size({arguments.format(same)}) -> ()")
        if told:
            why = rf"X: vLLM's moe_align_block_size {told}.*; install vllm 0.25"
            with pytest.raises(BackendUnavailable, match=why):
                operators("X", {namespace: ("moe_align_block_size",)})
        else:
            assert operators("X", {namespace: ("moe_align_block_size",)})
    finally:
        library._destroy()


def test_an_operator_that_another_version_lacks_is_told(
    registered: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8moe.backends.vllm_ops._load", lambda user, extension: None)
    with pytest.raises(BackendUnavailable, match=f"X: vLLM's {registered} has no gone: another version or device"):
        operators("X", {registered: ("there", "gone")})
