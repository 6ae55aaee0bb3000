"""The approximate reciprocal that recipes may declare, beside the device's own: every mantissa of bf16."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fp8moe.approximate_reciprocal import OFF, approximate_reciprocal


@triton.jit
def reciprocal_kernel(x, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(
        results + at,
        tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        ),
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="what is declared was read off Hopper's units: needs such a GPU",
)
def test_it_is_that_of_a_hopper_gpu() -> None:
    """Every positive normal bf16 number, and infinity: the largest have subnormal reciprocals, which are flushed."""
    values = torch.arange(0x80, 0x7F81, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().cuda()
    block = triton.next_power_of_2(values.numel())
    padded = torch.nn.functional.pad(values, (0, block - values.numel()), value=1.0)
    results = torch.empty_like(padded)
    reciprocal_kernel[(1,)](padded, results, BLOCK=block)
    wanted = approximate_reciprocal(values)
    assert torch.equal(results[: values.numel()].view(torch.int32), wanted.view(torch.int32))


def test_elsewhere_it_is_the_nearest() -> None:
    values = torch.cat([torch.linspace(1, 4, 4096), torch.arange(128, 256) / 128])
    found, nearest = approximate_reciprocal(values), 1.0 / values
    short = (values.view(torch.int32) & 0xFFFF) == 0
    assert torch.equal(found[~short], nearest[~short])
    off = found.view(torch.int32) - nearest.view(torch.int32)
    assert {
        int(mantissa * 128): n for mantissa, n in zip(values[-128:].tolist(), off[-128:].tolist(), strict=True) if n
    } == OFF
    assert approximate_reciprocal(torch.tensor([2.0**127])).tolist() == [0.0]
    assert approximate_reciprocal(torch.tensor([torch.inf, torch.nan]))[0] == 0
    assert approximate_reciprocal(torch.tensor([torch.nan])).isnan().all()
