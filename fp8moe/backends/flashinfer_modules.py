"""FlashInfer's compiled modules: which is a device's, where it lies, and what would be built before it is loaded."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fp8moe.platforms import Platform

FAMILIES = (100, 110, 120)
MODULES = {90: "90", 103: "103", 100: "100", 110: "100", 120: "120"}
"""By a device's own capability, or else its family's: which of FlashInfer's modules `fused_moe_*` is its."""
COMMAND = "fp8moe build FLASHINFER_CUTLASS"
NO_JIT = "FLASHINFER_DISABLE_JIT"
"""Where it is set FlashInfer loads what was built ahead of time, and nothing from its cache."""
AHEAD, CACHED = "built ahead of time", "in FlashInfer's cache"
CHANGED = "its sources, the compiler or the variables FLASHINFER_EXTRA_* have changed"
"""Why FlashInfer builds again what is in its cache."""


def has_cutlass(platform: Platform) -> bool:
    """FlashInfer's CUTLASS fused MoE is for this device."""
    return platform.is_cuda and (platform.cap == 90 or any(platform.in_family(family) for family in FAMILIES))


@dataclass(frozen=True)
class Located:
    """A module's file, and what FlashInfer does with it: `AHEAD` is loaded as it is, `CACHED` after a look whether it
    still fits its sources and flags."""

    path: Path
    kind: str

    def __str__(self) -> str:
        return f"{self.path}, {self.kind}"


@dataclass(frozen=True)
class FlashInferModule:
    """The module of a device, whether it is there or not.

    Args:
        name: as FlashInfer has it, such as "fused_moe_90".
        ahead, cache: the folders for modules that were built ahead of time, and for those that were built here.
    """

    name: str
    ahead: Path
    cache: Path

    @classmethod
    def of(cls, platform: Platform, places: Any) -> FlashInferModule:
        """
        Args:
            platform: one that `has_cutlass` takes.
            places: the module `flashinfer.jit.env`.
        """
        assert platform.cap is not None
        known = MODULES.get(platform.cap)
        number = known or MODULES[next(family for family in FAMILIES if platform.in_family(family))]
        return cls(f"fused_moe_{number}", Path(places.FLASHINFER_AOT_DIR), Path(places.FLASHINFER_JIT_DIR))

    @property
    def generator(self) -> str:
        """The function of `flashinfer.jit.fused_moe` that writes its sources and gives its `JitSpec`."""
        return f"gen_cutlass_fused_moe_sm{self.name.rpartition('_')[2]}_module"

    def spec(self) -> Any:
        """Its `JitSpec`; writes the sources where they are not there yet, in a second or two.

        Raises:
            AttributeError: this FlashInfer has no such function.
            Exception: whatever else FlashInfer's set-up raises, such as for want of nvcc.
        """
        return getattr(import_module("flashinfer.jit.fused_moe"), self.generator)()

    def located(self, env: Mapping[str, str]) -> Located | None:
        """Its file, if FlashInfer has one that it may load."""
        places = ((self.ahead, AHEAD),) if env.get(NO_JIT) else ((self.ahead, AHEAD), (self.cache, CACHED))
        files = (Located(place / self.name / f"{self.name}.so", kind) for place, kind in places)
        return next((file for file in files if file.path.is_file()), None)

    def not_built(self, env: Mapping[str, str]) -> str:
        """Why it cannot be loaded, with the remedy; "" where its file is there."""
        if self.located(env) is not None:
            return ""
        also = f", and {NO_JIT} forbids the cache" if env.get(NO_JIT) else f" or {self.cache}"
        return (
            f"not built: no {self.name}.so in {self.ahead}{also}; `{COMMAND}` builds it, and says beforehand how long "
            "that takes"
        )


def steps_to_build(spec: Any, env: Mapping[str, str]) -> int:
    """How many compilations and links FlashInfer would run before it loads the module: asked of ninja, which runs none.

    A file in the cache is compiled again where its sources or flags have changed: the variables FLASHINFER_EXTRA_*,
    the compiler, FlashInfer itself.

    Raises:
        OSError: no ninja.
        RuntimeError: ninja cannot tell.
    """
    spec.write_ninja()
    command = ["ninja", "-n", "-C", str(spec.build_dir), "-f", str(spec.ninja_path)]
    status = {"NINJA_STATUS": "[%f/%t] "}
    done = subprocess.run(command, env={**env, **status}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()[-300:]}")
    totals = re.findall(r"^\[\d+/(\d+)\] ", done.stdout, re.MULTILINE)
    return int(totals[-1]) if totals else 0
