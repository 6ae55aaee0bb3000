"""Shows that a mutant is no no-op: what can be asked about one cell, to be compared with the honest answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from conformance.selection.cells import Arguments, Cell
from conformance.selection.newcomers import ACCEPTING, REFUSING
from conformance.selection.removal import subsets
from conformance.zoo.selection.plant import Pair
from fp8moe import BackendSpec
from fp8moe.registry import seed_backends

BEFORE = (
    "sel1:device=sm100,libraries=none,allow_vllm_cutlass=yes",
    "sel1:VLLM_TEST_FORCE_FP8_MARLIN=1",
    "sel1:lora=yes",
    "sel1:device=sm75,VLLM_USE_DEEP_GEMM=1",
)
"""Cells that are asked first, for mutants that remember; the last of them fails."""


def observe(pair: Pair, cell: Cell) -> list[str]:
    """What a selector and its explanation do: after other cells, with every backend removed or alone, with the backends
    in another order or with more of them, with equal arguments, with another size and rank; and what became of the
    arguments."""
    with patch.dict(os.environ):
        return list(_observations(pair, cell))


def _observations(pair: Pair, cell: Cell) -> Iterator[str]:
    eleven, process = seed_backends(), dict(os.environ)
    for other in BEFORE:
        yield _ask(pair, _own(Cell.parse(other).arguments), eleven)
    arguments = _own(cell.arguments)
    for _ in range(40):  # some mutants do it now and then
        yield _answer(pair[0], arguments, eleven)
    for backends in (eleven, *subsets(eleven), eleven[::-1], (REFUSING, *eleven), (ACCEPTING, *eleven)):
        yield _ask(pair, arguments, backends)
    config = arguments.config
    parallel = replace(config.moe_parallel_config, dp_rank=config.moe_parallel_config.dp_size - 1)
    yield _ask(pair, arguments._replace(config=replace(config, moe_parallel_config=parallel)), eleven)
    odd = replace(config, num_experts=63, num_local_experts=1, experts_per_token=17)
    yield _ask(pair, arguments._replace(config=odd), eleven)
    env = {name: arguments.env[name] for name in reversed(tuple(arguments.env))}
    weight_key, activation_key = deepcopy((arguments.weight_key, arguments.activation_key))
    equal = arguments._replace(env=env, weight_key=weight_key, activation_key=activation_key)
    yield _ask(pair, equal, eleven)
    candidates = list(eleven)
    yield _ask(pair, arguments, candidates)
    yield f"{arguments.config} {arguments.env} {[spec.name for spec in candidates]} {os.environ == process}"


def _own(arguments: Arguments) -> Arguments:
    """A configuration and an environment that nobody else has, since some mutants write to them."""
    return arguments._replace(config=deepcopy(arguments.config), env=dict(arguments.env))


def _ask(pair: Pair, arguments: Arguments, backends: Sequence[BackendSpec]) -> str:
    return f"{_answer(pair[0], arguments, backends)}; {_answer(pair[1], arguments, backends)}"


def _answer(ask: Any, arguments: Arguments, backends: Sequence[BackendSpec]) -> str:
    try:
        answer = ask(*arguments[:4], platform=arguments.platform, env=arguments.env, backends=backends)
    except Exception as error:
        return _told(error)
    raised = getattr(answer, "error", None)
    return f"{answer!r} {getattr(answer, 'verdicts', '')} {'' if raised is None else _told(raised)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__} {error} {getattr(error, 'backend', None)} {getattr(error, 'reason', None)}"
