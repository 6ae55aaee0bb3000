"""Short ways to ask the selector, and the platforms that its checks name again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.selection.axes import SCHEMES
from conformance.selection.build import make_config
from fp8moe import BackendSpec, Platform, explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.registry import seed_backends

FLASHINFER, FLASHINFER_BACKEND = "VLLM_USE_FLASHINFER_MOE_FP8", "VLLM_FLASHINFER_MOE_BACKEND"
DEEP_GEMM, MOE_DEEP_GEMM = "VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM"
MARLIN, AITER, AITER_MOE = "VLLM_TEST_FORCE_FP8_MARLIN", "VLLM_ROCM_USE_AITER", "VLLM_ROCM_USE_AITER_MOE"

LIBRARIES = frozenset({"deep_gemm", "flashinfer", "vllm", "aiter"})
SM80, SM89, SM90, SM100 = (
    Platform("cuda", capability=divmod(capability, 10), cuda_version=(12, 9), libraries=LIBRARIES)
    for capability in (80, 89, 90, 100)
)
GFX942 = Platform("rocm", capability=(9, 4), gcn_arch="gfx942:sramecc+:xnack-", libraries=LIBRARIES)
GFX1100 = Platform("rocm", capability=(11, 0), gcn_arch="gfx1100", libraries=LIBRARIES)
CPU, XPU = Platform("cpu", libraries=LIBRARIES), Platform("xpu", libraries=LIBRARIES)
PLATFORMS = {"sm89": SM89, "sm90": SM90, "sm100": SM100, "gfx942": GFX942, "gfx1100": GFX1100, "cpu": CPU, "xpu": XPU}

ELEVEN: tuple[BackendSpec, ...] = seed_backends()
"""The candidates of the seed, whatever else is registered."""


def select(on: Platform = SM90, env: Mapping[str, str] | None = None, scheme: str = "block", **config: Any) -> str:
    """The value of the selected backend; ``allow`` and ``backends`` may stand among the configuration's parts."""
    arguments, keywords = call(on, env, scheme, config)
    return select_fp8_moe_backend(*arguments, **keywords)[0].value


def explain(on: Platform = SM90, env: Mapping[str, str] | None = None, scheme: str = "block", **config: Any) -> Any:
    """The explained selection of the same call."""
    arguments, keywords = call(on, env, scheme, config)
    return explain_fp8_moe_backend(*arguments, **keywords)


def call(
    on: Platform, env: Mapping[str, str] | None, scheme: str, config: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the selector."""
    parts = dict(config)
    allow, backends = parts.pop("allow", False), parts.pop("backends", None)
    arguments = (make_config(**parts), *SCHEMES[scheme], allow)
    return arguments, {"platform": on, "env": {} if env is None else env, "backends": backends}


def verdict(selection: Any, backend: str) -> Any:
    """A backend's verdict in an explained selection."""
    return next(verdict for verdict in selection.verdicts if verdict.backend.value == backend)


def refusal(selection: Any, backend: str) -> str | None:
    """The name of the reason against a backend, or None."""
    reason = verdict(selection, backend).reason
    return None if reason is None else str(reason.name)


def without(*names: str) -> tuple[BackendSpec, ...]:
    """The candidates but these."""
    return tuple(spec for spec in ELEVEN if spec.name not in names)
