"""A FlashInfer of a few lines in a folder, with a ninja, an nvcc and a c++ of as many: enough for `fp8moe build`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ENV = """
import os
from pathlib import Path
ARCHITECTURES = os.environ.get("FLASHINFER_CUDA_ARCH_LIST", "").replace(".", "")
FLASHINFER_AOT_DIR = Path(__file__).parents[1] / "data" / "aot"
FLASHINFER_JIT_DIR = Path(os.environ["FLASHINFER_WORKSPACE_BASE"]) / ARCHITECTURES / "cached_ops"
"""
CPP_EXT = """
import os
def get_cuda_path():
    if "CUDA_HOME" not in os.environ:
        raise RuntimeError("Could not find nvcc")
    return os.environ["CUDA_HOME"]
"""
FUSED_MOE_MODULE = """
import os, subprocess, sys
from pathlib import Path
from flashinfer.jit import env

class JitSpec:
    def __init__(self, name, sources):
        self.sources, self.build_dir = sources, env.FLASHINFER_JIT_DIR / name
        self.ninja_path = self.build_dir / "build.ninja"
        self.so = self.build_dir / (name + ".so")

    def write_ninja(self):
        self.build_dir.mkdir(parents=True, exist_ok=True)
        flags = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", "")
        self.ninja_path.write_text("\\n".join([flags, *self.sources, str(self.so)]))

    def build(self, verbose):
        assert verbose
        self.write_ninja()
        command = ["ninja", "-v", "-C", str(self.build_dir), "-f", str(self.ninja_path), "-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, stderr=subprocess.STDOUT).returncode:
            raise RuntimeError("Ninja build failed.")

def gen_cutlass_fused_moe_sm90_module():
    return JitSpec("fused_moe_90", ["one.cu", "two.cu", "three.cpp"])
"""
FUSED_MOE = """
class ActivationType: pass
def cutlass_fused_moe(): pass
"""
NINJA = """
import os, sys, time
from pathlib import Path
given = sys.argv[1:]
folder = Path(given[given.index("-C") + 1])
flags, *sources, so = Path(given[given.index("-f") + 1]).read_text().splitlines()
log = Path(os.environ["PLAYED_LOG"])
log.write_text(" ".join(given) + "\\n" + str(os.getpid()))
done = folder / "done"
fresh = set(done.read_text().splitlines()) if done.is_file() else set()
wanted = [f"{flags} -c /src/{source}" for source in sources]
todo = [step for step in wanted if step not in fresh]
todo += ["-o " + so] if todo or not Path(so).exists() else []
if not todo:
    print("ninja: no work to do.")
for number, step in enumerate(todo, 1):
    if "-n" not in given:
        if os.environ.get("PLAYED_FAILURE", "no step") in step:
            print(f"FAILED: {step}\\nnvcc {step}\\n" + os.environ.get("PLAYED_WORDS", "error: it does not compile"))
            sys.exit(1)
        if os.environ.get("PLAYED_HANG", "no step") in step:
            time.sleep(1000)
        fresh.add(step)
        done.write_text("\\n".join(fresh))
        if step.startswith("-o "):
            Path(so).touch()
    status = os.environ["NINJA_STATUS"].replace("%f", str(number)).replace("%t", str(len(todo)))
    print(f"{status}nvcc {step}", flush=True)
"""
CXX = """
import os, sys
lost = os.environ.get("PLAYED_LOST_LIBRARY")
sys.exit(lost is not None and lost in sys.argv)
"""
GIGABYTES = 64


@dataclass(frozen=True)
class Played:
    """Where everything is."""

    package: Path
    workspace: Path
    programs: Path
    cuda: Path
    log: Path

    @property
    def cache(self) -> Path:
        return self.workspace / "90a" / "cached_ops"

    @property
    def ahead(self) -> Path:
        return self.package / "data" / "aot"

    def put(self, place: Path) -> Path:
        """A built module."""
        file = place / "fused_moe_90" / "fused_moe_90.so"
        file.parent.mkdir(parents=True)
        file.touch()
        return file

    def ninja_pid(self) -> int:
        return int(self.log.read_text().splitlines()[1])


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        del sys.modules[name]


@pytest.fixture(name="played")
def played_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    site, programs, cuda = tmp_path / "site", tmp_path / "bin", tmp_path / "cuda"
    package = site / "flashinfer"
    files = {
        "__init__.py": "",
        "fused_moe.py": FUSED_MOE,
        "jit/__init__.py": "",
        "jit/env.py": ENV,
        "jit/cpp_ext.py": CPP_EXT,
        "jit/fused_moe.py": FUSED_MOE_MODULE,
    }
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path, text in {programs / "ninja": NINJA, programs / "c++": CXX, cuda / "bin" / "nvcc": ""}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        path.chmod(0o755)
    for header in ("cublasLt.h", "curand_kernel.h", "nvrtc.h"):
        (cuda / "include").mkdir(exist_ok=True)
        (cuda / "include" / header).touch()
    found = Played(package, tmp_path / "workspace", programs, cuda, tmp_path / "log")
    monkeypatch.syspath_prepend(str(site))
    for name in ("FLASHINFER_DISABLE_JIT", "FLASHINFER_EXTRA_CUDAFLAGS", "FLASHINFER_NVCC", "CXX", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")  # so that what the command sets is undone
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(found.workspace))
    monkeypatch.setenv("CUDA_HOME", str(cuda))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("PLAYED_LOG", str(found.log))
    monkeypatch.setattr("fp8moe.commands.flashinfer_build.free_memory", lambda: GIGABYTES * 10**9)
    monkeypatch.setattr("fp8moe.commands.flashinfer_build.interpreter_folder", lambda: "")
    forget()
    yield found
    forget()
