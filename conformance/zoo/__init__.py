"""Backends broken on purpose: what the suite must convict. Name one as `conformance.zoo:TORCH.gain_half_percent`."""

from __future__ import annotations

from types import SimpleNamespace

from conformance.zoo.arithmetic import NUMERICS
from conformance.zoo.around import AROUND
from conformance.zoo.attackers import ATTACKERS
from conformance.zoo.inside import INSIDE
from conformance.zoo.memory import MEMORY
from conformance.zoo.mutated import MUTATED, MUTATED_COMBINE
from conformance.zoo.padding import PADDING
from conformance.zoo.parallel import PARALLEL
from conformance.zoo.plant import Fault, plant
from conformance.zoo.routing import ROUTING
from conformance.zoo.scales import SCALES
from conformance.zoo.state import STATE
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.backends.triton_experts import TritonExperts

BASES = {"Standard": TorchExperts, "Batched": BatchedTorchExperts}

FAULTS: dict[str, Fault] = {
    fault.name: fault for fault in (*AROUND, *INSIDE, *ROUTING, *PADDING, *PARALLEL, *STATE, *SCALES, *NUMERICS)
}
"""What is planted in the plain PyTorch backends."""

ARITHMETIC: dict[str, Fault] = {fault.name: fault for fault in (*MUTATED, MUTATED_COMBINE)}
"""What changes only the last bits, in our kernels."""

TORCH = SimpleNamespace(**{fault.name: plant(fault, BASES[fault.format]) for fault in (*FAULTS.values(), *ATTACKERS)})
"""Every fault but those of kernels, in `TorchExperts` or `BatchedTorchExperts` by its format; the attackers too."""

TRITON = SimpleNamespace(**{fault.name: plant(fault, TritonExperts) for fault in (*AROUND, *MUTATED, MUTATED_COMBINE)})
"""The faults around a backend (its weights, its call, its result), and those of its kernels, in `TritonExperts`."""

BATCHED_TRITON = SimpleNamespace(**{fault.name: plant(fault, BatchedTritonExperts) for fault in (*AROUND, *MUTATED)})
"""Likewise in `BatchedTritonExperts`, whose combine is no kernel."""

UNSEEN = SimpleNamespace(**{fault.name: plant(fault, TritonExperts) for fault in MEMORY})
"""What no output shows: for `fp8moe sanitize`."""

# Each fault with the name of the class that it is planted as.
BACKEND_MUTANTS = tuple((fault, f"conformance.zoo:TORCH.{name}") for name, fault in FAULTS.items())
ATTACKER_CLASSES = tuple((fault, f"conformance.zoo:TORCH.{fault.name}") for fault in ATTACKERS)
# Of our kernels: on a GPU, or in Triton's interpreter what that can show.
KERNEL_MUTANTS = tuple(
    ((ARITHMETIC | FAULTS)[name], f"conformance.zoo:{zoo}.{name}")
    for zoo, faults in (("TRITON", TRITON), ("BATCHED_TRITON", BATCHED_TRITON))
    for name in vars(faults)
)
