"""Backends broken on purpose: what the suite must convict. Name one as `conformance.zoo:TORCH.gain_half_percent`."""

from __future__ import annotations

from types import SimpleNamespace

from conformance.zoo.around import AROUND
from conformance.zoo.inside import INSIDE
from conformance.zoo.mutated import MUTATED, MUTATED_COMBINE
from conformance.zoo.plant import Fault, plant
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.backends.triton_experts import TritonExperts

FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*AROUND, *INSIDE)}
"""What is gross, or at least larger than the last bit."""

ARITHMETIC: dict[str, Fault] = {fault.name: fault for fault in (*MUTATED, MUTATED_COMBINE)}
"""What changes only the last bits."""

TORCH = SimpleNamespace(**{fault.name: plant(fault, TorchExperts) for fault in FAULTS.values()})
"""Every fault but those of kernels, in `TorchExperts`."""

TRITON = SimpleNamespace(**{fault.name: plant(fault, TritonExperts) for fault in (*AROUND, *MUTATED, MUTATED_COMBINE)})
"""The faults around a backend (its weights, its call, its result), and those of its kernels, in `TritonExperts`."""

BATCHED_TRITON = SimpleNamespace(**{fault.name: plant(fault, BatchedTritonExperts) for fault in (*AROUND, *MUTATED)})
"""Likewise in `BatchedTritonExperts`, whose combine is no kernel."""
