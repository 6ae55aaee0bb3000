"""Backends that harm a GPU, one way each; imported only where there is one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from conformance.contain.faults import Fault, Misbehaving, ref_of
from conformance.results import Status

FAR = 1 << 40
"""Elements past a tensor's beginning, where no memory is."""
SPIN_CYCLES = 40_000_000_000
"""About 20 s at the clock of today's GPUs: longer than any limit that is set here, and no process waits for ever."""
CHUNK_BYTES = 1 << 30


@triton.jit
def _store(pointer, offset):  # type: ignore[no-untyped-def]
    tl.store(pointer + offset, 1.0)


def _store_at(offset: int) -> None:
    target = torch.zeros(16, device="cuda")
    _store[(1,)](target, offset)


def prepare() -> None:
    """Compiles the kernel and launches nothing, so that no fault is charged for it."""
    _store.warmup(torch.float32, FAR, grid=(1,))


class StoresOutOfBounds(Misbehaving):
    def misbehave(self) -> None:
        _store_at(FAR)


class StoresOutOfBoundsElsewhere(Misbehaving):
    """On a stream of its own, which nothing waits for."""

    def misbehave(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            _store_at(FAR)


class ConstructorStoresOutOfBounds(Misbehaving):
    """The error shows when somebody next waits for the device."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _store_at(FAR)


class Asserts(Misbehaving):
    def misbehave(self) -> None:
        torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")]


class Spins(Misbehaving):
    def misbehave(self) -> None:
        torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]


class FillsTheDevice(Misbehaving):
    def misbehave(self) -> None:
        kept: list[torch.Tensor] = self.__dict__.setdefault("kept", [])
        while True:
            kept.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cuda"))


DEVICE_FAULTS: tuple[Fault, ...] = (
    Fault("illegal access", ref_of("StoresOutOfBounds", __name__), "illegal memory access"),
    Fault("illegal access on another stream", ref_of("StoresOutOfBoundsElsewhere", __name__), "illegal memory access"),
    Fault(
        "illegal access in the constructor", ref_of("ConstructorStoresOutOfBounds", __name__), "illegal memory access"
    ),
    Fault("device-side assertion", ref_of("Asserts", __name__), "device-side assert"),
    Fault("endless kernel", ref_of("Spins", __name__), "did not end within", 0.3),
    Fault("fills the device", ref_of("FillsTheDevice", __name__), "out of memory", 1.0, Status.NOT_RUN),
)
