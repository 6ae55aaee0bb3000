"""Where pairs go: every present pair has one row, in the order that is promised, and nothing else has any."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels.places import CHUNK, CHUNKS, place_pairs


def expected(local: list[int], experts: int, alignment: int) -> tuple[list[int], dict[int, int]]:
    """Each pair's row, or -1, and the pair of each row that has one."""
    places, pairs, start = [-1] * len(local), {}, 0
    for expert in range(experts):
        mine = [pair for pair, owner in enumerate(local) if owner == expert]
        for row, pair in enumerate(mine, start):
            places[pair], pairs[row] = row, pair
        start += -(-len(mine) // alignment) * alignment
    return places, pairs


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (5, 3, 8), (CHUNK, 1, 3), (CHUNK, 2, 33), (700, 8, 70), (3, 2, 200)]
)
def test_places(tokens: int, top_k: int, experts: int, alignment: int, mapped: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens + top_k)
    ids = torch.randint(-2, experts + 2, (tokens, 2 * top_k), generator=generator)[:, ::2]
    expert_map = torch.randperm(experts, generator=generator).sub(experts // 3) if mapped else None
    mine = experts - experts // 3 if mapped else experts
    local = [-1 if not 0 <= i < experts else i if expert_map is None else int(expert_map[i]) for i in ids.flatten()]
    local = [-1 if i < 0 else int(i) for i in local]
    places, pairs = expected(local, mine, alignment)
    rows = len(local) + min(mine, len(local)) * (alignment - 1) + 3
    given = (ids.to(device), mine, rows, alignment, None if expert_map is None else expert_map.to(device))
    found = place_pairs(*given, rows_of_owner=1, places=True, pair_of_row=True)
    numbers = (found.local_ids, found.owners, found.places, found.pair_of_row)
    assert {each.dtype for each in numbers} == {torch.int32}
    assert found.local_ids.tolist() == local
    aligned = [-(-local.count(expert) // alignment) * alignment for expert in range(mine)]
    assert found.starts.tolist() == [sum(aligned[:expert]) for expert in range(mine + 1)]
    assert found.places.tolist() == places
    assert found.pair_of_row.tolist() == [pairs.get(row, -1) for row in range(rows)]
    assert found.owners.tolist() == [local[pairs[row]] if row in pairs else -1 for row in range(rows)]


@pytest.mark.parametrize("tokens", [5000, CHUNK * CHUNKS, CHUNK * (CHUNKS + 2) + 9])
def test_more_chunks_than_are_summed_up_at_a_time(tokens: int, device: torch.device) -> None:
    ids = torch.randint(-1, 3, (tokens, 1), generator=torch.Generator().manual_seed(tokens))
    places = place_pairs(ids.to(device), 3, tokens + 48, 16, places=True).places
    assert places.tolist() == expected((ids[:, 0]).tolist(), 3, 16)[0]
