"""`fp8moe build`: where kernels are, what a build needs and takes, and the build, on a FlashInfer of a few lines."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fp8moe import PLATFORMS
from fp8moe.backends import flashinfer_cutlass
from fp8moe.backends.flashinfer_modules import FlashInferModule, steps_to_build
from fp8moe.cli import EXIT_BAD_INPUT
from fp8moe.commands import flashinfer_build, flashinfer_needs
from fp8moe.commands.flashinfer_build import CannotBuild, Estimate, Machine, Progress, clock, free_memory, run_builder
from fp8moe.registry import BackendUnavailable
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)
from tests.unit.played_flashinfer import Played, forget, played_flashinfer  # noqa: F401 (a fixture)

BUILD = ("build", "FLASHINFER_CUTLASS", "--arch", "90a")
THERE, NOT_THERE, CANNOT = 0, 1, 2


@pytest.mark.parametrize("name", ["TRITON", "DEEPGEMM", "flashinfer-trtllm"])
def test_other_backends_have_nothing_to_build(name: str) -> None:
    assert "nothing to build" in run("build", name).stdout


def test_no_such_backend() -> None:
    assert "did you mean" in run("build", "FLASHINFER_CUTLAS", status=EXIT_BAD_INPUT).stderr


@pytest.mark.parametrize("arch", ["80", "hopper", "8.9"])
def test_an_architecture_without_these_kernels(arch: str) -> None:
    told = run("build", "FLASHINFER_CUTLASS", "--arch", arch, status=EXIT_BAD_INPUT).stderr
    assert f"--arch '{arch}': its kernels are for SM90, SM10x" in told


def test_without_a_device_the_architecture_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.commands.build.detected_platform", lambda: PLATFORMS["a100"])
    assert "such as --arch 90a" in run("build", "FLASHINFER_CUTLASS", status=CANNOT).stderr


def test_kernels_that_are_not_there(played: Played) -> None:
    told = run(*BUILD, "--check", status=NOT_THERE).stdout
    assert f"no fused_moe_90.so in {played.ahead} or {played.cache}; `fp8moe build FLASHINFER_CUTLASS`" in told
    assert not played.log.exists()


def test_kernels_built_ahead_of_time_need_nothing(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    file = played.put(played.ahead)
    monkeypatch.delenv("CUDA_HOME")
    for asked in ((), ("--check",)):
        assert run(*BUILD, *asked).stdout.strip() == f"{file}, built ahead of time"


@pytest.mark.parametrize("arch", ["90a", "9.0a", "sm_90a", "SM90A"])
def test_a_build_from_nothing(played: Played, arch: str) -> None:
    found = run("build", "FLASHINFER_CUTLASS", "--arch", arch, "--jobs", "3")
    file = played.cache / "fused_moe_90" / "fused_moe_90.so"
    first, last = found.stdout.splitlines()
    assert first == f"fused_moe_90: {Estimate(4, 3)}"
    assert last.startswith(f"{file}, in FlashInfer's cache; built in ")
    steps = [line.partition(":")[0] for line in found.stderr.splitlines()]
    assert steps == ["1/4 one.cu", "2/4 two.cu", "3/4 three.cpp", "4/4 linking"]
    assert found.stderr.splitlines()[-1].endswith(", about 0 s left")
    assert "-j 3" in played.log.read_text()
    for asked in ((), ("--check",)):
        assert run(*BUILD, *asked).stdout.strip() == f"{file}, in FlashInfer's cache"


def test_a_failed_build_says_what_failed_and_the_next_one_goes_on(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAYED_FAILURE", "three.cpp")
    told = run(*BUILD, status=CANNOT).stderr
    assert "the build failed (status 1) after 2 of 4 steps\nFAILED:  -c /src/three.cpp\nerror: it does not" in told
    assert "nvcc  -c" not in told
    monkeypatch.delenv("PLAYED_FAILURE")
    assert run(*BUILD).stdout.startswith("fused_moe_90: 2 steps at about")


def test_a_compiler_that_was_killed_asks_for_fewer_jobs(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAYED_FAILURE", "two.cu")
    monkeypatch.setenv("PLAYED_WORDS", "nvcc error: 'cicc' died due to signal 9 (Kill signal)")
    assert "for want of memory: --jobs 2\n" in run(*BUILD, "--jobs", "4", status=CANNOT).stderr


def test_a_builder_that_raises_before_it_starts(played: Played) -> None:
    path = played.package / "jit" / "fused_moe.py"
    path.write_text(path.read_text().replace("assert verbose", "raise OSError('no room')"))
    told = run(*BUILD, status=CANNOT).stderr
    assert "the build failed (status 1) after 0 of 0 steps" in told
    assert told.endswith("OSError: no room\n")


def test_a_build_that_leaves_nothing(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.commands.build.run_builder", lambda *given: 0.0)
    assert f"left no fused_moe_90.so in {played.cache}" in run(*BUILD, status=CANNOT).stderr


def is_running(pid: int) -> bool:
    """Not one that has ended and is not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stopped_build_ends_its_children(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAYED_HANG", "two.cu")
    module = FlashInferModule("fused_moe_90", played.ahead, played.cache)

    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt, match=r"1/4 one\.cu"):
        run_builder(module, Estimate(4, 1), Machine.here(), stop)
    until = time.monotonic() + 10  # its parent is gone, and whoever adopted it may not have waited for it yet
    while is_running(played.ninja_pid()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(played.ninja_pid())
    assert (played.cache / "fused_moe_90" / "done").read_text() == " -c /src/one.cu"


def test_a_stopped_build_is_told(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8moe.commands.build.run_builder", stop)
    assert "the same command goes on from here" in run(*BUILD, status=NOT_THERE).stderr


def test_a_module_that_no_longer_fits_its_flags(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*BUILD)
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-lineinfo")
    assert "FlashInfer would run 4 steps of a build before it loads it: its sources, the compiler" in (
        run(*BUILD, "--check", status=NOT_THERE).stdout
    )
    module = FlashInferModule("fused_moe_90", played.ahead, played.cache)
    with pytest.raises(RuntimeError, match=r"would run 4 steps .* `fp8moe build FLASHINFER_CUTLASS`"):
        flashinfer_cutlass.check_loads_as_it_is(module)
    assert run(*BUILD).stdout.startswith("fused_moe_90: 4 steps")
    flashinfer_cutlass.check_loads_as_it_is(module)


def test_nothing_is_asked_of_a_module_built_ahead(played: Played) -> None:
    played.put(played.ahead)
    flashinfer_cutlass.check_loads_as_it_is(FlashInferModule("fused_moe_90", played.ahead, played.cache))
    assert not played.log.exists()


def test_a_cache_that_flashinfer_itself_could_not_load(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    file = played.put(played.cache)
    (played.programs / "ninja").unlink()
    with pytest.raises(RuntimeError, match=re.escape(f"cannot load {file} (FileNotFoundError")):
        flashinfer_cutlass.check_loads_as_it_is(FlashInferModule("fused_moe_90", played.ahead, played.cache))


def test_ninja_that_cannot_tell(played: Played) -> None:
    spec = FlashInferModule("fused_moe_90", played.ahead, played.cache).spec()
    spec.sources.append("four.cu\nno\nfile")
    (played.programs / "ninja").write_text("#!/bin/sh\necho ninja: error: a loop; exit 1\n")
    with pytest.raises(RuntimeError, match="ninja: error: a loop"):
        steps_to_build(spec, os.environ)


# -- what is missing --


def test_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flashinfer", None)
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "")
    told = run(*BUILD, status=CANNOT).stderr
    assert "does not load" in told
    assert "install flashinfer-python 0.6.13" in told


def test_another_flashinfer(played: Played) -> None:
    path = played.package / "jit" / "fused_moe.py"
    path.write_text(path.read_text().replace("gen_cutlass", "generate_cutlass"))
    told = run(*BUILD, status=CANNOT).stderr
    assert "has no gen_cutlass_fused_moe_sm90_module: another version; install flashinfer-python 0.6.13" in told


def test_a_flashinfer_that_cannot_prepare(played: Played) -> None:
    path = played.package / "jit" / "fused_moe.py"
    path.write_text(
        path.read_text().replace("    return JitSpec", "    raise OSError('disk full')\n    return JitSpec")
    )
    assert "cannot prepare fused_moe_90 (OSError: disk full); install" in run(*BUILD, status=CANNOT).stderr


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("bin/ninja", "ninja: not on PATH; pip install ninja"),
        ("bin/c++", "a C++ compiler: no c++; install it, or set CXX"),
        ("cuda/bin/nvcc", "cuda/bin/nvcc; install it, or set FLASHINFER_NVCC, or CUDA_HOME"),
        ("cuda/include/cublasLt.h", "headers: no cublasLt.h in "),
    ],
)
def test_a_missing_tool_is_told_with_its_remedy(played: Played, lost: str, told: str) -> None:
    (played.programs.parent / lost).unlink()
    assert told in run(*BUILD, status=CANNOT).stderr


def test_all_that_is_missing_is_told_at_once(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    (played.programs / "ninja").unlink()
    told = run(*BUILD, status=CANNOT).stderr
    assert "FLASHINFER_DISABLE_JIT=1 forbids FlashInfer to build: unset it" in told
    assert "CUDA: FlashInfer finds none (Could not find nvcc); install the CUDA toolkit" in told
    assert "ninja: not on PATH" in told


def test_a_library_that_the_last_step_would_lack_is_told_before_the_first(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAYED_LOST_LIBRARY", "-lnvrtc")
    told = run(*BUILD, status=CANNOT).stderr
    assert f"libraries: the linker finds no libnvrtc.so with {played.cuda / 'lib64'}; install" in told
    assert "FLASHINFER_EXTRA_LDFLAGS=-L" in told


def test_headers_beside_torch_are_named(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = played.package.parent / "nvidia" / "cu13" / "include"
    beside.mkdir(parents=True)
    for header in flashinfer_needs.HEADERS:
        (played.cuda / "include" / header).rename(beside / header)
    flags = f"-isystem {beside}"
    assert f"set FLASHINFER_EXTRA_CUDAFLAGS='{flags}' and FLASHINFER_EXTRA_CFLAGS" in run(*BUILD, status=CANNOT).stderr
    for given in (flags, f"-O3 -I{beside}", f"-I {beside}"):
        monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", given)
        assert "would run 4 steps" not in run(*BUILD).stdout


def test_where_the_cache_is_forbidden_it_does_not_count(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    played.put(played.cache)
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    told = run(*BUILD, "--check", status=NOT_THERE).stdout
    assert f"in {played.ahead}, and FLASHINFER_DISABLE_JIT forbids the cache" in told


# -- memory and time --


def test_as_many_jobs_as_cores_and_memory_allow() -> None:
    assert Machine(16, 128 * 10**9, {}).jobs(None) == 16
    assert Machine(16, 50 * 10**9, {}).jobs(None) == 7
    assert Machine(16, 50 * 10**9, {}).jobs(3) == 3
    assert Machine(2, 50 * 10**9, {}).jobs(6) == 6  # as asked, though there are fewer cores
    with pytest.raises(CannotBuild, match="--jobs 8 may take 56 GB, and 50 GB are free; give --jobs 7, or end"):
        Machine(16, 50 * 10**9, {}).jobs(8)
    with pytest.raises(CannotBuild, match="one compilation may take 7 GB, and 6 GB are free; build on another machine"):
        Machine(16, 6 * 10**9, {}).jobs(None)


def test_too_little_memory_is_told_before_anything_starts(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_build, "free_memory", lambda: 10**9)
    assert "memory: one compilation may take 7 GB, and 1 GB are free" in run(*BUILD, status=CANNOT).stderr
    assert "-v" not in played.log.read_text().split()


def test_free_memory_is_no_more_than_the_groups_limit(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       64000 kB\nMemAvailable:   32000 kB\n")
    assert free_memory(info, tmp_path) == 32000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(info, tmp_path) == 32000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory(info, tmp_path) == 1_000_000
    assert free_memory(tmp_path / "none", tmp_path / "none") == flashinfer_build.UNIT_BYTES


def test_an_estimate_in_words() -> None:
    told = str(Estimate(183, 14))
    assert "183 steps" in told
    assert told.endswith(f"with 14 at a time about {clock(Estimate(183, 14).seconds)} and up to 98 GB of memory")


def test_time_left_is_as_estimated_at_first_and_as_measured_later() -> None:
    progress = Progress(Estimate(183, 2), start=100.0)
    assert progress.line("some warning\n", 105.0) == ""
    assert progress.line("[1/183] nvcc -O3 -c /src/a/one.cu -o one.o\n", 140.0) == (
        "1/183 one.cu: 40 s so far, about 2.6 h left"
    )
    last = progress.line("[171/183] c++ -c two.cpp -o two.o\n", 100.0 + 171 * 10)
    assert last == "171/183 two.cpp: 28 min so far, about 2 min left"


@pytest.mark.parametrize(("seconds", "told"), [(0.2, "0 s"), (119, "119 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds: float, told: str) -> None:
    assert clock(seconds) == told


# -- the adapter --


def test_platform_tells_what_is_not_built(played: Played) -> None:
    def lacks() -> str:
        return flashinfer_cutlass.FlashInferCutlassExperts.lacks_here(PLATFORMS["h200"], {})

    assert lacks().startswith("not built: no fused_moe_90.so in ")
    built = played.ahead / "fused_moe_90" / "fused_moe_90.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert lacks() == ""
    (played.package / "jit" / "env.py").unlink()
    forget()
    assert "flashinfer.jit.env does not load" in lacks()


def test_block_scales_need_a_compiler_at_the_first_call(played: Played) -> None:
    env = {"PATH": str(played.programs)}
    assert "compiled at the first call by nvcc, which is not there" in flashinfer_cutlass.block_compiler(env)
    assert flashinfer_cutlass.block_compiler(env | {"CUDA_HOME": str(played.cuda)}) == ""
    assert flashinfer_cutlass.block_compiler(env | {"PATH": str(played.cuda / "bin")}) == ""
    named = {"TRTLLM_DG_NVCC_COMPILER": str(played.programs / "nvcc-13")}
    assert named["TRTLLM_DG_NVCC_COMPILER"] in flashinfer_cutlass.block_compiler(env | named)


class OnH200(flashinfer_cutlass.FlashInferCutlassExperts):
    """As far as its library; a layer is not needed for that."""

    def __init__(self, *, block: bool) -> None:
        self.block = block

    def platform(self) -> Any:
        return PLATFORMS["h200"]


def test_the_adapter_loads_what_is_there_and_builds_nothing(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"OnH200: not built: .* `fp8moe build FLASHINFER_CUTLASS` builds it"):
        OnH200(block=False).library()
    run(*BUILD)
    assert OnH200(block=False).library().cutlass_fused_moe
    assert OnH200(block=True).library().cutlass_fused_moe
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(BackendUnavailable, match="OnH200: block: its kernels are compiled at the first call"):
        OnH200(block=True).library()
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-lineinfo")
    flashinfer_cutlass.check_loads_as_it_is.cache_clear()
    forget()
    with pytest.raises(BackendUnavailable, match="OnH200: FlashInfer would run 4 steps of a build"):
        OnH200(block=False).library()
