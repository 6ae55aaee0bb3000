"""How much of the device's memory a backend takes beside the weights, inputs and output that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class Memory:
    """Bytes, as torch's allocator counts them: what a library takes for itself in another way is not seen.

    Args:
        held: still allocated afterwards: converted weights, workspaces that are kept.
        peak: allocated at the same time at the most.
    """

    held: int
    peak: int

    def then(self, later: Memory) -> Memory:
        """Of both, one after the other."""
        return Memory(self.held + later.held, max(self.peak, self.held + later.peak))

    def figures(self) -> dict[str, float]:
        """As a result's figures."""
        return {"held_bytes": self.held, "peak_bytes": self.peak}


def high_water(work: Callable[[], Made]) -> tuple[Made, Memory]:
    """What `work` returns, and the memory that it took on torch's current device."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = work()
    torch.cuda.synchronize()
    return made, Memory(torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)
