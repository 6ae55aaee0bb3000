"""Backends broken on purpose: what the suite must convict. Name one as `conformance.zoo:TORCH.gain_half_percent`."""

from __future__ import annotations

from types import SimpleNamespace

from conformance.zoo.around import AROUND
from conformance.zoo.inside import INSIDE
from conformance.zoo.plant import Fault, plant
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.backends.triton_experts import TritonExperts

FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*AROUND, *INSIDE)}

TORCH = SimpleNamespace(**{fault.name: plant(fault, TorchExperts) for fault in FAULTS.values()})
"""Every fault in `TorchExperts`."""

TRITON = SimpleNamespace(**{fault.name: plant(fault, TritonExperts) for fault in AROUND})
"""The faults that sit around a backend (its weights, its call, its result) in `TritonExperts`."""
