"""The cells of a simulated run: one on each of six layers of published models, for each of seven numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.gate.simulated.work import COPY, GEMM, LARGE_GEMM, SHORT_GEMM, UNROLLED, Work

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
CALL_US: dict[str, tuple[float, ...]] = {
    "DeepSeek-V3 TP8, block": (38, 222, 435, 556, 733, 1516, 4059),
    "DeepSeek-V3 EP8, block": (141, 500, 541, 638, 1152, 3337, 11774),
    "Qwen3-30B-A3B, block": (25, 153, 228, 269, 351, 696, 1970),
    "Qwen3-235B-A22B TP4, block": (30, 157, 233, 283, 395, 832, 2379),
    "Mixtral-8x7B TP2, per-channel": (84, 233, 272, 305, 516, 1606, 5844),
    "Qwen3-30B-A3B, per-channel": (23, 153, 225, 267, 371, 896, 3012),
}
"""Microseconds of one call of the fastest of three libraries' kernels, for each of `TOKENS`. Measured on one H100,
2026-11-24."""
SHORT_US = 50.0
"""Below, a call counts as short: the gap before a graph is several parts in a hundred of it."""


@dataclass(frozen=True)
class Mixed:
    """A cell of the mix: its name, microseconds of a call, and whose noise it has."""

    name: str
    call_us: float
    work: Work


def _work_of(tokens: int, call_us: float) -> Work:
    """Few tokens read every expert's weights for little arithmetic; from about 1,000 on the matrix units are busy."""
    if call_us < SHORT_US:
        return SHORT_GEMM
    return COPY if tokens <= 256 else GEMM if tokens <= 1024 else LARGE_GEMM


MIX: tuple[Mixed, ...] = (
    Mixed("short, M=1", SHORT_GEMM.stream.call_us, SHORT_GEMM),  # shorter than any layer above
    *(
        Mixed(f"{layer}, M={tokens}", call_us, _work_of(tokens, call_us))
        for layer, times in CALL_US.items()
        for tokens, call_us in zip(TOKENS, times, strict=True)
    ),
)
"""43 cells, 10 us to 12 ms a call; a pair of graphs of 20 calls of each takes 1.9 s in all."""

KINDS: dict[str, tuple[Work, ...]] = {
    "memory-bound": (COPY,),
    "compute-bound": (GEMM, LARGE_GEMM),
    "short": (SHORT_GEMM,),
}
"""Kinds of work in the study of error rates, and the noise of their cells."""


GRAPH_US = 4000.0
"""How long a graph is, at most: verdicts were measured on graphs of up to 3.6 ms. Of longer ones nothing is known, and
on the simulated device the clocks change within a pair of them."""
FEWEST_CALLS = 2
"""In a graph, however long they are, so that not all calls are the first on cold caches."""


def unrolled(call_us: float, graph_us: float) -> int:
    """Calls in a graph: 20 as measured, fewer where they take longer than `graph_us`."""
    return min(max(int(min(graph_us / call_us, UNROLLED)), FEWEST_CALLS), UNROLLED)


def cells_of(kind: str) -> tuple[Mixed, ...]:
    """The cells of the mix of one kind."""
    return tuple(cell for cell in MIX if cell.work in KINDS[kind])
