"""What the interpreter's cases and those of the published models reach."""

from __future__ import annotations

import torch

from conformance.build import expert_map_of, routing
from conformance.cases import Case
from conformance.models import MODELS
from conformance.pinned import GPU_TOKENS, MODEL_SCHEMES, model_cases, simulated_cases
from conformance.plan import Cell, Subject, Target
from conformance.results import Evidence
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.triton_arithmetic import LARGE_TILE, tile_height
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.dispatch import local_ids
from fp8moe.platforms import PLATFORMS

COLUMNS = STEP = 128
SIMULATED = [
    Cell(Subject(cls.__name__, cls, cls.__name__), scheme, None, "", Evidence.SIMULATED, tuple(sorted(activations)))
    for cls, activations in (
        (TritonExperts, {"silu", "gelu", "swigluoai", "swiglustep"}),
        (BatchedTritonExperts, {"silu", "gelu", "swigluoai"}),
    )
    for scheme in (*MODEL_SCHEMES, "none")
]


def crosses_in_m(cell: Cell, case: Case) -> bool:
    """Whether an expert has more pairs than a tile has rows."""
    _, ids = routing(case)
    local = local_ids(ids, expert_map_of(case), case.local_experts)
    rows = torch.bincount(local[local >= 0], minlength=1).max()
    batched = cell.subject.experts_cls is BatchedTritonExperts
    return bool(rows > (LARGE_TILE if batched else tile_height(case.tokens * case.top_k, case.experts)))


def test_at_least_200_simulated_cases_cross_an_edge_in_m_n_and_k() -> None:
    crossing = [
        case
        for cell in SIMULATED
        for case in simulated_cases(cell)
        if min(case.hidden, case.inter) > max(COLUMNS, STEP) and crosses_in_m(cell, case)
    ]
    assert len(crossing) >= 200


def test_half_of_the_simulated_cases_have_exact_sums() -> None:
    for cell in SIMULATED:
        exact = [case.values == "exact_sums" for case in simulated_cases(cell)]
        assert sum(exact) >= len(exact) / 2


def test_models_on_a_gpu_are_all_there_on_every_scheme_at_every_size_and_with_many_experts() -> None:
    cases = model_cases(Target("cuda", PLATFORMS["h100"], "cuda"))
    found = {(str(case.model).partition(":")[0], case.scheme, case.tokens) for case in cases}
    assert found >= {(name, scheme, tokens) for name in MODELS for scheme in MODEL_SCHEMES for tokens in GPU_TOKENS}
    assert max(case.local_experts for case in cases) >= 256
