"""`fp8moe build BACKEND`: where the kernels are that a library builds beforehand, or their build."""

from __future__ import annotations

import os
import re

from rich.text import Text

from fp8moe.backends.flashinfer_cutlass import REMEDY
from fp8moe.backends.flashinfer_modules import AHEAD, CHANGED, FlashInferModule, has_cutlass, steps_to_build
from fp8moe.backends.libraries import loaded
from fp8moe.commands.flashinfer_build import CannotBuild, Estimate, Machine, clock, run_builder
from fp8moe.commands.flashinfer_needs import missing_tools
from fp8moe.commands.question import BadInput, pick
from fp8moe.commands.tables import console
from fp8moe.libraries import DISTRIBUTIONS, Surroundings, one_line
from fp8moe.platforms import Platform, detected_platform
from fp8moe.registry import BackendUnavailable, default_backends, registered_backends

BUILDS = "FLASHINFER_CUTLASS"
"""The one backend whose library builds for minutes before its first call."""
ARCHITECTURES = "FLASHINFER_CUDA_ARCH_LIST"
THERE, NOT_THERE, CANNOT = 0, 1, 2


def built(backend: str, *, check: bool, jobs: int | None, arch: str | None) -> int:
    """Prints where the kernels are, or builds them; the exit status.

    Raises:
        BadInput: no such backend, or an architecture that its kernels are not for.
    """
    name = pick("the backend", backend, [spec.name for spec in (*default_backends(), *registered_backends())])
    if name != BUILDS:
        _say(f"{name}: nothing to build; its kernels come with their library, or are compiled when they are called")
        return THERE
    try:
        return _built(*_architecture(arch), check=check, jobs=jobs)
    except (CannotBuild, BackendUnavailable) as error:
        _say(f"fp8moe build: {error}", stderr=True)
        return CANNOT
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here", stderr=True)
        return NOT_THERE


def _say(text: str, *, stderr: bool = False) -> None:
    console(stderr=stderr).print(Text(text), soft_wrap=True)


def _built(platform: Platform, variables: dict[str, str], *, check: bool, jobs: int | None) -> int:
    os.environ.update(variables)  # FlashInfer reads them when it is imported
    machine = Machine.here()
    module = FlashInferModule.of(platform, _imported("flashinfer.jit.env", "FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR"))
    found = module.located(machine.env)
    if found is None and check:
        _say(module.not_built(machine.env))
        return NOT_THERE
    steps = 0 if found is not None and found.kind == AHEAD else _steps(module, machine)
    if found is not None and not steps:
        _say(str(found))
        return THERE
    if check:
        _say(f"{found}; FlashInfer would run {steps} steps of a build before it loads it: {CHANGED}")
        return NOT_THERE
    estimate = Estimate(steps, machine.jobs(jobs))
    _say(f"{module.name}: {estimate}")
    seconds = run_builder(module, estimate, machine, lambda line: _say(line, stderr=True))
    found = module.located(machine.env)
    if found is None:
        raise CannotBuild(f"FlashInfer built without an error, but left no {module.name}.so in {module.cache}")
    _say(f"{found}; built in {clock(seconds)}")
    return THERE


def _architecture(asked: str | None) -> tuple[Platform, dict[str, str]]:
    """The device to build for, and the variables that tell FlashInfer so; none where it is the one that is here."""
    if asked is None:
        here = detected_platform()
        if not has_cutlass(here):
            raise CannotBuild(f"no device is here that its kernels are for ({here.kind}); name one, such as --arch 90a")
        return here, {}
    found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)([af]?)", asked.strip().lower())
    platform = Platform("cuda", capability=(int(found[1]), int(found[2]))) if found else None
    if found is None or platform is None or not has_cutlass(platform):
        raise BadInput(f"--arch {asked!r}: its kernels are for SM90, SM10x, SM11x and SM12x; expected such as 90a")
    return platform, {ARCHITECTURES: f"{found[1]}.{found[2]}{found[3]}"}


def _imported(module: str, *names: str) -> object:
    return loaded(module, names, BUILDS, REMEDY)


def _steps(module: FlashInferModule, machine: Machine) -> int:
    """What there is to build, for a machine that has what it takes.

    Raises:
        CannotBuild: it has not, or FlashInfer is another version.
        BackendUnavailable: FlashInfer does not load.
    """
    _imported("flashinfer.jit.fused_moe", module.generator)
    lacking = missing_tools(machine.env, _imported("flashinfer.jit.cpp_ext", "get_cuda_path").get_cuda_path)  # type: ignore[attr-defined]
    if lacking:
        raise CannotBuild("\n".join(lacking))
    try:
        return steps_to_build(module.spec(), machine.env)
    except Exception as error:  # whatever FlashInfer's set-up raises
        version = Surroundings().version(*DISTRIBUTIONS["flashinfer"])
        told = f"FlashInfer {version or 'of unknown version'} cannot prepare {module.name} ({one_line(error)})"
        raise CannotBuild(f"{told}; {REMEDY}") from error
