"""One GPU for each worker of pytest-xdist."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch


def count() -> int:
    """How many GPUs torch may use here; asking does not open them."""
    return torch.cuda.device_count()


def take_one(worker: int, workers: int, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Leaves this process, and those that it starts, one of the GPUs; to be called before any is opened.

    Args:
        worker: its number, from 0.
        workers: how many there are: more than GPUs share them in turn.
        environment: where the driver reads which devices it may show.

    Returns:
        Whether no other worker has that GPU.
    """
    here = count()
    if here < 2:
        return here == 1 and workers == 1
    # ROCm reads both, its own first.
    names = ("CUDA_VISIBLE_DEVICES",) if torch.version.hip is None else ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    variable = next((name for name in names if environment.get(name)), names[0])
    shown = environment.get(variable) or ",".join(map(str, range(here)))
    environment[variable] = shown.split(",")[worker % here].strip()
    # pytest-xdist replaces a worker that crashed by one with a new number; and a driver that was asked before how many
    # devices there are may show them all the same.
    return workers <= here and worker < workers and count() == 1
