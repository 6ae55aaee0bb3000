"""Placing pairs and quantising in one launch: as by two."""

from __future__ import annotations

from dataclasses import fields
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.kernels import align
from fp8moe.kernels.align import align_and_quantize, align_pairs
from fp8moe.kernels.begin import begin
from fp8moe.kernels.few import FEW, FewPlaced, place_few_pairs
from fp8moe.kernels.quantize import quantize_per_token_group
from tests.kernels.test_few import SETTINGS, Call, apart, calls
from tests.kernels.test_quantize import rows_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity over infinity


@SETTINGS
@given(
    calls(),
    st.sampled_from([1, 127, 128, 200, 640, 1100]),
    st.sampled_from(["normal", "wide", "special"]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([1e-10, 1e-4]),
)
@example(Call(torch.zeros(FEW, 1, dtype=torch.int32), 1, 16), 200, "special", torch.bfloat16, 1e-10)
def test_as_by_two_launches(
    device: torch.device, call: Call, columns: int, kind: str, dtype: torch.dtype, floor: float
) -> None:
    x = apart(rows_of(kind, len(call.ids), columns, dtype), device)
    ids, expert_map = apart(call.ids, device), call.map_on(device)
    placed, codes, scales = begin(x, ids, *call.sizes, expert_map, amax_floor=floor)
    expected = place_few_pairs(ids, *call.sizes, expert_map)
    for field in fields(FewPlaced):
        got, want = getattr(placed, field.name), getattr(expected, field.name)
        assert got.dtype == want.dtype
        assert torch.equal(got, want), field.name
    want_codes, want_scales = quantize_per_token_group(x, amax_floor=floor)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scales.view(torch.int32), want_scales.view(torch.int32))


def test_alignment_is_that_of_align_pairs(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 40, (9, 4), generator=generator).to(device)
    expert_map = torch.where(torch.arange(40) % 2 == 0, torch.arange(40) // 2, -1).to(device)
    x = torch.randn(9, 300, generator=generator).to(torch.bfloat16).to(device)
    for given_map, experts in ((None, 40), (expert_map, 20)):
        with patch.object(align, "begin", wraps=begin) as one:
            alignment, (codes, scales) = align_and_quantize(x, ids, experts, 16, given_map, amax_floor=1e-10)
        assert one.called
        expected = align_pairs(ids, experts, 16, given_map)
        assert alignment.likely == expected.likely
        for name in ("local_ids", "pairs", "tile_experts"):
            assert torch.equal(getattr(alignment, name), getattr(expected, name)), name
        assert codes.shape == x.shape
        assert scales.shape == (9, 3)
