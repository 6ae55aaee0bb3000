"""Checks of single calls: what a grid of outcomes cannot show, each asked at a few hundred telling cells.

Each takes a selector and a cell, and gives what was expected and what came, or None. Where the answer itself is other
than the model's, or ``explain`` raises, they say nothing: the grid's invariants do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from conformance.selection.cells import Arguments, Cell
from conformance.selection.explanations import Explain
from conformance.selection.facts import Array
from conformance.selection.grid import Product
from conformance.selection.model import EVERY, RULES, Expectation, expect, expect_call
from conformance.selection.newcomers import ACCEPTING, REFUSING
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.predicates import BACKENDS
from conformance.selection.runner import Select
from conformance.selection.texts import missing_from
from conformance.selection.violations import Violation
from fp8moe import BackendSpec, FusedMoEConfig

Disagreement = tuple[str, str]
"""What was expected, what came."""


@dataclass(frozen=True)
class Subject:
    """The selector under judgement; ``specs`` are the eleven, in the specification's order."""

    select: Select
    explain: Explain
    classifier: Classifier
    specs: Sequence[BackendSpec]

    @cached_property
    def other_orders(self) -> dict[tuple[int, ...], tuple[BackendSpec, ...]]:
        """The eleven from the last to the first, and turned round."""
        orders = (EVERY[::-1], EVERY[5:] + EVERY[:5])
        return {order: tuple(self.specs[index] for index in order) for order in orders}

    @cached_property
    def with_newcomers(self) -> tuple[tuple[BackendSpec, ...], ...]:
        """The eleven after one that refuses, before it, and after one that takes everything."""
        return (REFUSING, *self.specs), (*self.specs, REFUSING), (ACCEPTING, *self.specs)

    def outcome(self, arguments: Arguments, backends: Sequence[BackendSpec] | None = None) -> int:
        """The code of ``select``'s answer."""
        given = self.specs if backends is None else backends
        return self.classifier.call(
            self.select, *arguments[:4], platform=arguments.platform, env=arguments.env, backends=given
        )

    def raised(self, arguments: Arguments, backends: Sequence[BackendSpec]) -> Exception | None:
        """What ``select`` raises."""
        try:
            self.select(*arguments[:4], platform=arguments.platform, env=arguments.env, backends=backends)
        except Exception as error:
            return error
        return None

    def explained(self, arguments: Arguments, backends: Sequence[BackendSpec]) -> Any:
        """The explanation, or None where ``explain`` raises."""
        try:
            return self.explain(*arguments[:4], platform=arguments.platform, env=arguments.env, backends=backends)
        except Exception:
            return None


Check = Callable[[Subject, Arguments], Disagreement | None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Registers a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


@check
def errors_say_why(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """A text has the reason of each backend it is about, or the variable and its text; ``explain`` has the same."""
    expected = expect_call(*arguments)
    error = subject.raised(arguments, subject.specs)
    if error is None or subject.classifier.error(error) != int(expected.outcome):
        return None
    missing = missing_from(str(error), expected, arguments.env)
    if missing:
        return f"a text with {missing[0]}", f"{type(error).__name__}: {error}"
    explained = getattr(subject.explained(arguments, subject.specs), "error", None)
    if explained is not None and (type(explained), str(explained)) != (type(error), str(error)):
        return f"explain's error to be {error!r}", repr(explained)
    return None


@check
def arguments_are_left_alone(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """Neither call changes its environment, its list of backends, its configuration, or the process environment."""
    for ask in (subject.raised, subject.explained):
        given = arguments._replace(config=deepcopy(arguments.config), env=dict(arguments.env))
        backends = list(subject.specs)
        process = dict(os.environ)
        ask(given, backends)
        changed = dict(os.environ) != process
        if changed:
            os.environ.clear()
            os.environ.update(process)
        parts = {
            "os.environ": changed,
            "env": given.env != arguments.env,
            "backends": backends != list(subject.specs),
            "config": given.config != arguments.config,
        }
        for name, is_changed in parts.items():
            if is_changed:
                return f"{name} as it was", f"{name} changed"
    return None


@check
def equal_arguments_give_equal_answers(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """Copies of every argument, and the variables in the reverse order."""
    first = subject.outcome(arguments)
    config, weight_key, activation_key, allow, platform, env = arguments
    reordered = {name: env[name] for name in reversed(tuple(env))}
    copies = Arguments(*deepcopy((config, weight_key, activation_key, allow, platform)), reordered)
    return _differ(first, subject.outcome(copies))


@check
def sizes_and_ranks_do_not_matter(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """No predicate reads a size, a count, a bias, the activations' dtype, a rank or how many ranks there are."""
    first = subject.outcome(arguments)
    for config in _resized(arguments.config):
        found = _differ(first, subject.outcome(arguments._replace(config=config)))
        if found is not None:
            return found[0], f"{found[1]} at {config}"
    return None


def _resized(config: FusedMoEConfig) -> list[FusedMoEConfig]:
    parallel = config.moe_parallel_config
    groups = {kind: getattr(parallel, f"{kind}_size") for kind in ("tp", "pcp", "dp", "ep")}
    ranks: dict[str, Any] = {f"{kind}_rank": size - 1 for kind, size in groups.items()}
    more: dict[str, Any] = {f"{kind}_size": 8 for kind, size in groups.items() if size > 1}
    sizes = ("num_experts", "experts_per_token", "hidden_dim", "intermediate_size_per_partition", "num_local_experts")
    tiny: dict[str, Any] = dict.fromkeys(sizes, 1)
    odd: dict[str, Any] = dict(zip(sizes, (1023, 17, 7169, 2041, 1001), strict=True))
    return [
        replace(config, **tiny, max_num_tokens=1, has_bias=True),
        replace(config, **odd, in_dtype=torch.float16, disable_inplace=not config.disable_inplace),
        replace(config, moe_parallel_config=replace(parallel, **ranks)),
        replace(config, moe_parallel_config=replace(parallel, **more)),
    ]


@check
def the_order_given_is_kept(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """The candidates are considered in the order in which they were given, whatever the registry's."""
    for order, backends in subject.other_orders.items():
        found = _differ(int(expect_call(*arguments, order).outcome), subject.outcome(arguments, backends))
        if found is not None:
            return found
        verdicts = getattr(subject.explained(arguments, backends), "verdicts", ())
        want, got = [BACKENDS[index] for index in order], [verdict.backend for verdict in verdicts]
        if set(want) == set(got) and want != got:
            return f"verdicts in the order {want}", str(got)
    return None


@check
def a_newcomer_counts_only_where_it_fits(subject: Subject, arguments: Arguments) -> Disagreement | None:
    """One that refuses changes nothing, wherever it stands; one that takes everything is chosen by a scan that begins
    with it, and by nothing else."""
    expected = expect_call(*arguments)
    first = int(expected.outcome)
    *refusing, backends = subject.with_newcomers
    for more in refusing:
        found = _differ(first, subject.outcome(arguments, more))
        if found is not None:
            return found[0], f"{found[1]} with a backend more that refuses"
    if RULES[int(expected.rule)] not in ("R8", "R9"):
        return _differ(first, subject.outcome(arguments, backends))
    try:
        answer = subject.select(*arguments[:4], platform=arguments.platform, env=arguments.env, backends=backends)
    except Exception as error:
        answer = error
    wanted = (ACCEPTING.backend, ACCEPTING.experts_cls)
    return None if answer == wanted else (f"{ACCEPTING.name}, the first, with its class", repr(answer))


def _differ(want: int, got: int) -> Disagreement | None:
    return None if want == got else (describe(want), describe(got))


def telling_cells(products: Sequence[Product], numbers_of: Sequence[Array], at_least: int) -> list[Cell]:
    """Of these cells, one for each way in which a selection can end, and at least so many evenly spread."""
    step = max(1, sum(map(len, numbers_of)) // max(1, at_least))
    found: list[Cell] = []
    seen: set[int] = set()
    for product, numbers in zip(products, numbers_of, strict=True):
        ends = _ends(expect(product.facts_at(numbers)), len(numbers))
        _, first = np.unique(ends, return_index=True)
        new = [at for at in first.tolist() if int(ends[at]) not in seen]
        seen.update(int(ends[at]) for at in new)
        chosen = sorted({*new, *range(len(found) % step, len(numbers), step)})
        found += [product.cell(int(numbers[at])) for at in chosen]
    return found


def _ends(expected: Expectation, count: int) -> Array:
    rule, outcome = (np.broadcast_to(part, (count,)).astype(np.int64) for part in (expected.rule, expected.outcome))
    return rule * 256 + outcome


def violations(subject: Subject, cells: Sequence[Cell]) -> Mapping[str, Violation | None]:
    """Each check of ``CHECKS`` at each cell."""
    return {name: violation(name, subject, cells) for name in CHECKS}


def violation(name: str, subject: Subject, cells: Sequence[Cell]) -> Violation | None:
    """One check at each cell, the simplest of the cells that break it shown."""
    broken = [
        (sum(index != 0 for index in cell.indices), str(cell), found)
        for cell in cells
        if (found := CHECKS[name](subject, cell.arguments)) is not None
    ]
    if not broken:
        return None
    _, cell, (expected, got) = min(broken)
    return Violation(name, len(broken), cell, expected, got, f" --check {name}")
