"""The activations that the replay computes with torch are those of the kernels, bit for bit, wherever both run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conformance.bits import difference
from fp8moe.activations import GATED
from fp8moe.kernels.activation import activate
from fp8moe.reference.portable import PORTABLE

ROWS, COLUMNS = 64, 128


def every_kind(device: torch.device) -> Tensor:
    """(ROWS, 2 * COLUMNS) fp32: any bits at all, ordinary numbers, and what is special on either side of a gate."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (ROWS // 2, 2 * COLUMNS), generator=generator)
    wild = bits.to(torch.int32).view(torch.float32)
    plain = torch.randn(ROWS // 2, 2 * COLUMNS, generator=generator) * 2.0 ** torch.randint(
        -6, 5, (ROWS // 2, 1), generator=generator
    )
    special = torch.tensor([0.0, -0.0, 7.0, -7.0, 15.0, 88.72283, 88.72284, -87.4, -103.98, -104.1, 2.0**-149, 3e38])
    special = torch.cat([special, torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])])
    plain[0] = special.repeat(2 * COLUMNS // 16)
    plain[1] = special.repeat_interleave(2 * COLUMNS // 16)
    return torch.cat([wild, plain]).to(device)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", PORTABLE)
def test_the_replay_has_the_kernels_activations(name: str, device: torch.device) -> None:
    values = every_kind(device)
    if name not in GATED:
        values = values.reshape(-1, COLUMNS)
    got = activate(values, name)
    assert not difference(PORTABLE[name](values), got).differing
    assert not difference(PORTABLE[name](values.cpu()), got.cpu()).differing
    for dtype in (torch.bfloat16, torch.float16):
        assert not difference(PORTABLE[name](values).to(dtype), activate(values, name, dtype=dtype)).differing
