"""Tiles of few pairs: as by the kernels for many, and as by torch; and MARLIN on them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.backends.marlin import TILES
from fp8moe.kernels import align, few
from fp8moe.kernels.align import most_tiles
from fp8moe.kernels.few import FEW, FEWER, MOST_EXPERTS, FewPlaced, place_few_pairs
from fp8moe.kernels.interpreter import INTERPRETED
from fp8moe.kernels.places import place_pairs
from fp8moe.validation import ID_DTYPES
from tests.contracts.few import few_by_torch

SETTINGS = settings(max_examples=20 if INTERPRETED else 60, deadline=None)  # 0.6 s for one in the interpreter


@dataclass(frozen=True)
class Call:
    """The arguments of `place_few_pairs`, on the CPU."""

    ids: Tensor
    experts: int
    tile_rows: int
    expert_map: Tensor | None = None

    @property
    def tiles(self) -> int:
        return most_tiles(self.ids.numel(), self.experts, self.tile_rows)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.experts, self.tiles, self.tile_rows

    def map_on(self, device: torch.device) -> Tensor | None:
        return None if self.expert_map is None else self.expert_map.to(device)

    def by_torch(self, **wanted: Any) -> FewPlaced:
        return few_by_torch(self.ids, *self.sizes, self.expert_map, **wanted)

    def on(self, device: torch.device, **wanted: Any) -> FewPlaced:
        # With the device's sizes, also in the interpreter, which has larger ones.
        with patch.object(few, "INTERPRETED", False):
            return place_few_pairs(apart(self.ids, device), *self.sizes, self.map_on(device), **wanted)


def apart(values: Tensor, device: torch.device) -> Tensor:
    """The same values with every stride twice what it was."""
    rows, columns = values.shape
    wide = torch.zeros((2 * rows, 2 * columns), dtype=values.dtype, device=device)
    view = wide[::2, ::2]
    view.copy_(values)
    return view


@st.composite
def calls(draw: st.DrawFn) -> Call:
    top_k = draw(st.integers(1, 10))
    tokens = draw(st.integers(1, 9) | st.integers(1, 128 // top_k))
    experts = draw(st.integers(1, 9) | st.sampled_from([64, 257]))
    elsewhere = draw(st.none() | st.integers(0, 3))
    expert_map, every = None, experts
    if elsewhere is not None:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        local = torch.cat((torch.arange(experts), torch.full((elsewhere,), -1)))
        local = local[torch.randperm(len(local), generator=generator)]
        expert_map, every = local.to(draw(st.sampled_from([torch.int32, torch.int64]))), len(local)
    outside = st.sampled_from([-1, -7, every, every + 1, 2**31 - 1, -(2**31)])
    inside = st.integers(0, draw(st.sampled_from([0, every - 1])))
    ids = draw(
        st.lists(inside | outside if draw(st.booleans()) else inside, min_size=tokens * top_k, max_size=tokens * top_k)
    )
    dtype = draw(st.sampled_from(ID_DTYPES))
    shaped = torch.tensor(ids, dtype=torch.int64).to(dtype).view(tokens, top_k)
    return Call(shaped, experts, draw(st.sampled_from(TILES)), expert_map)


@SETTINGS
@given(calls())
@example(Call(torch.zeros(FEW, 1, dtype=torch.int32), 1, 8))
@example(Call(torch.arange(FEW).view(-1, 8), FEW, 64))
@example(Call(torch.full((FEW // 8, 8), -1), 8, 16))
def test_as_by_torch_and_as_many_are_placed(device: torch.device, call: Call) -> None:
    pairs = call.ids.numel()
    weights = torch.rand(call.ids.shape, generator=torch.Generator().manual_seed(pairs))
    for pad, wanted in ((-1, None), (pairs, weights)):
        found = call.on(device, pad=pad, weights=None if wanted is None else apart(wanted, device))
        expected = call.by_torch(pad=pad, weights=wanted)
        for field in fields(FewPlaced):
            got, want = getattr(found, field.name), getattr(expected, field.name)
            assert got.dtype == want.dtype
            assert torch.equal(got.cpu(), want), field.name
    rows = call.tiles * call.tile_rows
    given = (call.ids.to(device), call.experts, rows, call.tile_rows, call.map_on(device))
    many, found = place_pairs(*given, rows_of_owner=call.tile_rows, pair_of_row=True), call.on(device)
    for name in ("local_ids", "pair_of_row", "owners"):
        assert torch.equal(getattr(found, name), getattr(many, name)), name


SIDES = [(FEWER, 20), (FEWER + 1, 20), (FEW, 20), (FEW + 1, 20)]
MANY_EXPERTS = [(FEWER, MOST_EXPERTS + 1), (FEWER + 1, MOST_EXPERTS), (FEWER + 1, MOST_EXPERTS + 1)]


@pytest.mark.parametrize(("pairs", "experts"), [*SIDES, *MANY_EXPERTS])
def test_alignment_is_the_same_on_either_side_of_the_most(pairs: int, experts: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(-1, experts + 1, (pairs, 1), generator=generator)
    expected = Call(ids, experts, 16).by_torch()
    with patch.object(align, "place_pairs", wraps=place_pairs) as many:
        found = align.align_pairs(ids.to(device), experts, 16)
    assert many.called == (pairs > FEW or (pairs > FEWER and experts > MOST_EXPERTS))
    for got, want in (
        (found.local_ids, expected.local_ids),
        (found.pairs.flatten(), expected.pair_of_row),
        (found.tile_experts, expected.owners),
    ):
        assert torch.equal(got.cpu(), want)


def test_a_local_id_that_no_expert_has_is_elsewhere(device: torch.device) -> None:
    """An eager call raises for such a map; in a captured one it counts as -1."""
    found = Call(torch.tensor([[0, 1, 2, 2]]), 2, 8, torch.tensor([2, 3, 1])).on(device)
    assert found.local_ids.tolist() == [-1, -1, 1, 1]
    assert (found.pair_of_row.tolist()[:3], found.count.tolist()) == ([2, 3, -1], [8])


def test_weights_of_absent_pairs_are_not_read(device: torch.device) -> None:
    call, weights = Call(torch.tensor([[0, -1, 5]]), 2, 8), torch.tensor([[2.0, torch.nan, torch.inf]])
    assert call.on(device, weights=weights.to(device)).weights.tolist() == [2.0, 0.0, 0.0]


def test_captured_in_a_graph_it_places_what_is_there_when_it_is_replayed(gpu: torch.device) -> None:
    ids, expert_map = torch.zeros(16, 8, dtype=torch.int32, device=gpu), torch.tensor([1, -1, 0], device=gpu)
    call = Call(torch.randint(-1, 3, ids.shape, generator=torch.Generator().manual_seed(0)), 2, 16, expert_map.cpu())
    place_few_pairs(ids, *call.sizes, expert_map)  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = place_few_pairs(ids, *call.sizes, expert_map)
    ids.copy_(call.ids)
    graph.replay()
    expected = call.by_torch()
    assert torch.equal(found.pair_of_row.cpu(), expected.pair_of_row)
    assert torch.equal(found.owners.cpu(), expected.owners)
