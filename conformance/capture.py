"""Capture of calls in a CUDA graph, undisturbed by Python's collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncollected() -> Iterator[None]:
    """Python collects before, and not inside."""
    collects = gc.isenabled()
    if collects:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def capturing(beside: torch.cuda.CUDAGraph | None = None) -> Iterator[torch.cuda.CUDAGraph]:
    """What is launched inside goes into the graph.

    Args:
        beside: an earlier graph whose memory this one uses as well; the two are never replayed at the same time.

    Another graph that is collected meanwhile frees its memory, which ends a capture with an error that names neither;
    torch collects before a capture only where it is told to. So it is done here, and nothing is collected inside.
    """
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph, pool=None if beside is None else beside.pool()):
        yield graph
