"""Settings that every backend of a process shares: what they are, and which of them a job has changed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping

import torch

ABSENT = "absent"

_FLAGS: tuple[str, ...] = (
    "cuda.matmul.allow_tf32",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.fp32_precision",
    "cudnn.allow_tf32",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.enabled",
    "fp32_precision",
    "mkldnn.enabled",
)
"""Below torch.backends; not every torch has every one."""

SUITES_VARIABLES = ("TRITON_INTERPRET", "VLLM_", "FP8MOE_", "OMP_", "OPENBLAS_", "MKL_")
"""Beginnings of variables that say how the suite computes, or what is selected. Others a library may set where they are
not set, as is usual at its first use; none may be changed."""


def _float_mode() -> str:
    """How the processor rounds, and whether it keeps subnormal numbers: what torch can set and not tell."""
    smallest, one = sys.float_info.min, 1.0
    subnormal = "kept" if smallest / 2 > 0 else "flushed to zero"
    nearest = one + 1e-17 == one and one - 1e-17 == one
    return f"subnormal numbers {subnormal}, {'rounds to nearest' if nearest else 'does not round to nearest'}"


def _flag(path: str) -> object:
    found: object = torch.backends
    for name in path.split("."):
        found = getattr(found, name)
    return found


_READ: Mapping[str, Callable[[], object]] = {
    "torch's default dtype": torch.get_default_dtype,
    "torch's default device": lambda: torch.get_default_device(),
    "torch's grad mode": torch.is_grad_enabled,
    "torch's inference mode": torch.is_inference_mode_enabled,
    "torch's anomaly mode": torch.is_anomaly_enabled,
    "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "torch's deterministic algorithms, warning only": torch.is_deterministic_algorithms_warn_only_enabled,
    "torch's filling of uninitialised memory": lambda: torch._C._get_deterministic_fill_uninitialized_memory(),
    "torch's number of threads": torch.get_num_threads,
    "torch's float32 matmul precision": torch.get_float32_matmul_precision,
    "torch's autocast on the CPU": lambda: torch.is_autocast_enabled("cpu"),
    "torch's autocast on CUDA": lambda: torch.is_autocast_enabled("cuda"),
    "torch's function modes": lambda: torch._C._len_torch_function_stack(),
    "torch's dispatch modes": lambda: torch._C._len_torch_dispatch_stack(),
    "the floating-point mode": _float_mode,
    "the working directory": os.getcwd,
    "sys.gettrace": lambda: sys.gettrace() is not None,
    "sys.getprofile": lambda: sys.getprofile() is not None,
}


def _value(read: Callable[[], object]) -> str:
    try:
        return str(read())
    except AttributeError:
        return ABSENT
    except Exception as error:  # torch refuses to tell some flags once others are set
        return f"unreadable ({type(error).__name__})"


class Settings:
    """What the settings are now."""

    def __init__(self) -> None:
        self.values = {name: _value(read) for name, read in _READ.items()}
        self.values |= {f"torch.backends.{path}": _value(lambda path=path: _flag(path)) for path in _FLAGS}  # type: ignore[misc]
        self.handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self.environment = dict(os.environ)
        self.path = tuple(sys.path)

    def changes(self, later: Settings) -> list[str]:
        """What is not as it was, one clause for each, with both values. Additions to `sys.path` and to search paths in
        the environment do not count: libraries make them when they are imported."""
        found = [
            f"it changed {name} from {old} to {later.values[name]}"
            for name, old in self.values.items()
            if later.values[name] != old
        ]
        found += [
            f"it changed the handler of {signal.Signals(number).name}"
            for number, old in self.handlers.items()
            if later.handlers.get(number) != old
        ]
        for name in sorted(self.environment.keys() | later.environment.keys()):
            old_text, new_text = self.environment.get(name), later.environment.get(name)
            if _only_longer(name, old_text, new_text):
                continue
            if old_text != new_text and (old_text is not None or name.startswith(SUITES_VARIABLES)):
                found.append(f"it changed os.environ[{name!r}] from {_quoted(old_text)} to {_quoted(new_text)}")
        missing = [entry for entry in self.path if entry not in later.path]
        if missing:
            found.append(f"it removed {missing[0]!r} from sys.path")
        return found


def _only_longer(name: str, old: str | None, new: str | None) -> bool:
    """Whether a search path has all of its folders still, in their order."""
    if not name.endswith("PATH") or name.startswith(SUITES_VARIABLES) or old is None or new is None:
        return False
    later = iter(new.split(os.pathsep))
    return all(folder in later for folder in old.split(os.pathsep))


def _quoted(text: str | None) -> str:
    if text is None:
        return ABSENT
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
