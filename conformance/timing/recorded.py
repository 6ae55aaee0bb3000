"""A record of many cells among yardsticks, in this process or in a fresh one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from conformance.gate.record import Record, measure
from conformance.timing.cells import TimedCell
from conformance.timing.samplers import DeviceRounds
from conformance.timing.state import Watch
from conformance.timing.yardsticks import yardsticks
from fp8moe.counted import counted
from fp8moe.detection import describe_device

HERE = Path(__file__).parents[2]
TIMING = "2"
"""Of how a cell is timed: another number for whatever changes times by that alone. 2: graphs in many places."""
Planted = Mapping[str, tuple[int, int]]
"""By a cell's name, of the calls in its graph those that are told and how many more there are: slower on purpose."""


def setting() -> dict[str, str]:
    """What must be the same for times of two days to be compared."""
    device = describe_device()
    return {
        "device": device.name,
        "driver": str(device.driver),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "timing": TIMING,
    }


def recorded(names: Sequence[str], planted: Planted, ours: int) -> tuple[Record, dict[str, str]]:
    """Times the cells of these names here; with it, what was seen of the device, in words. Progress goes to stderr.

    Args:
        ours: as in `Watch`.
    """
    with Watch(ours) as watch:
        print(f"speed: preparing {counted(len(names), 'cell')} and the yardsticks", file=sys.stderr, flush=True)
        cells = {name: partial(TimedCell.parse(name).prepared, *planted.get(name, (None, 0))) for name in names}
        record = measure(names, DeviceRounds(cells, yardsticks(), setting(), watch))
    return record, watch.told()
