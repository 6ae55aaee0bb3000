"""Where the kernels run: a CUDA or ROCm device, or Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
CANNOT_RUN = (
    "no GPU, and TRITON_INTERPRET is not set: tests/unit/test_kernels_interpreter.py runs these in the interpreter"
    if not INTERPRETED and not torch.cuda.is_available()
    else "triton is not installed"
    if importlib.util.find_spec("triton") is None
    else None
)


class SkippedModule(pytest.Module):
    """A module that is not imported, since that would import triton, as compiler, for whoever comes later."""

    def collect(self) -> NoReturn:
        pytest.skip(CANNOT_RUN or "", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if CANNOT_RUN else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the tensors."""
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For the interpreter: it works in small steps, where threads that wait for each other cost more than they save."""
    threads = torch.get_num_threads()
    if INTERPRETED:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """A real device, for what is too large for the interpreter or has no meaning in it."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def hopper(gpu: torch.device) -> torch.device:
    if torch.version.hip or torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("the bits are those of Hopper's matrix unit")
    return gpu


def nearest_e4m3(x: Tensor) -> Tensor:
    """The e4m3 value nearest to `x`, in float64: at a tie the one with the even code, saturating, NaN stays NaN."""
    table = torch.arange(127, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).double()
    x = x.double()
    magnitude = torch.where(x.isnan(), 0.0, x.abs()).clamp(max=448.0)
    above = torch.searchsorted(table, magnitude)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    value = table[torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)]
    return torch.where(x.isnan(), torch.nan, value.copysign(x))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in groups of 128: values in float64 and scales, max(amax, 1e-10) / 448, in fp32."""
    rows, columns = x.shape
    groups = -(-columns // 128)
    padded = torch.nn.functional.pad(x.float(), (0, groups * 128 - columns)).reshape(rows, groups, 128)
    scale = padded.abs().amax(-1).clamp(min=1e-10) / torch.tensor(448.0, device=x.device)
    return nearest_e4m3((padded / scale[..., None]).reshape(rows, -1)[:, :columns]), scale


@pytest.fixture(scope="session")
def nearest() -> Callable[[Tensor], Tensor]:
    return nearest_e4m3


@pytest.fixture(scope="session")
def quantised() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return quantise_rows
