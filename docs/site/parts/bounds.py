"""Worked examples of the bounds, computed when the site is built: a dot product, and an element of an output."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from conformance.bounds import UNKNOWN, Allowance, Judgement, allowance_for, judge
from conformance.bounds.accumulation import PREFIX, Operands, accumulation_error
from conformance.bounds.allowance import half_spacing
from conformance.bounds.judgement import MEANINGS
from conformance.bounds.statistics import element_ratio
from conformance.cases import Case
from conformance.oracles import tensors_of, trace_of
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.keys import FP8_DTYPE
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.units import chain
from parts.markdown import code, prose, table, text

TERMS = 1024
UNITS = {
    "fp32": FP32,
    "hopper.wgmma, promoted every 128": Arithmetic.on("hopper.wgmma", promote_every=128),
    "hopper.wgmma, never promoted": Arithmetic.on("hopper.wgmma"),
    "not declared": UNKNOWN,
}
CASE = Case.parse("v1:M=16,seed=7")
TOKEN, COLUMN = 0, 5


def accumulation_example() -> str:
    """A row of 1,024 FP8 codes times another, by several arithmetics.

    Raises:
        ValueError: a unit is farther off than its bound.
    """
    a, weight = codes()
    products = a.double() * weight.double()
    prefix = products.view(-1, PREFIX).sum(1).cumsum(0)
    lines = table(
        ("quantity", "value"),
        (
            ("K", str(TERMS)),
            ("z, the exact sum", number(products.sum())),
            ("P, the largest prefix at every 128", number(prefix.abs().max())),
            ("Q, the root of the sum of squared products", number(products.square().sum().sqrt())),
        ),
    )
    return f"{lines}\n\n{table(('arithmetic', 'bound', 'computed', 'error', 'error/bound'), map(_row, UNITS))}"


def _row(name: str) -> tuple[str, ...]:
    a, weight = codes()
    arithmetic = UNITS[name]
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    least = nothing if arithmetic.fraction_bits is None else torch.full_like(nothing, 2.0**-6)
    operands = Operands(a.double()[None], weight.double()[None], least, least, product_bits=6)
    bound = accumulation_error(operands, arithmetic)
    if arithmetic is UNKNOWN:
        return name, number(bound), "-", "-", "-"
    step = arithmetic.promote_every or TERMS
    total = torch.zeros(1, 1)
    for start in range(0, TERMS, step):
        k = slice(start, start + step)
        total = total + chain(a[None, k], weight[None, k], arithmetic.unit)
    error = (total.double() - operands.a @ operands.weight.t()).abs()
    ratio = float(error / bound)
    if not ratio <= 1:
        raise ValueError(f"{name}: error/bound {ratio:.3g}, and its bound is said to hold")
    return name, number(bound), number(total), number(error), f"{ratio:.2f}"


@cache
def codes() -> tuple[Tensor, Tensor]:
    """Two rows of FP8 numbers over eight binades, more of them positive than negative: a sum that grows with K."""
    k = torch.arange(TERMS, dtype=torch.float64)
    a = (torch.sin(k * 0.7) + 0.4) * 2.0 ** (k % 8)
    weight = (torch.sin(k * 1.3) + 0.4) * 2.0 ** (k * 5 % 8)
    return a.to(FP8_DTYPE), weight.to(FP8_DTYPE)


@cache
def judged() -> tuple[RecipeTrace, Tensor, dict[Arithmetic, tuple[Allowance, Judgement]]]:
    """The recipe oracle of `CASE`, what `TorchExperts` gives for it, and both judgements."""
    tensors = tensors_of(CASE, "cpu")
    trace = trace_of(tensors, TorchExperts.contract.recipe)
    backend = TorchExperts(tensors.config, tensors.quant, tensors.weights)
    output = backend.apply(tensors.hidden_states, tensors.topk_weights, tensors.topk_ids)
    found = {one: (allowance_for(trace, one), judge(trace, output, one)) for one in (FP32, UNKNOWN)}
    return trace, output, found


def element_example() -> str:
    """What one element of an output is judged by, declared and not."""
    trace, output, found = judged()
    place = (TOKEN, COLUMN)
    reference, got = trace.smooth[place], output[place].double()
    fmt = trace.problem.carrier
    rows: list[list[str]] = [[] for _ in range(8)]
    for allowance, _ in found.values():
        smooth, flips = allowance.smooth[place], allowance.flips[place]
        reach = half_spacing(reference.abs() + smooth + flips, fmt)
        limit = 2 * reach + smooth + flips
        values = (reference, got, got - reference, smooth, flips, reach, limit)
        ratio = float(element_ratio(got - reference, reference, smooth + flips, fmt))
        for row, value in zip(rows, (*map(number, values), f"{ratio:.3f}"), strict=True):
            row.append(value)
    names = (
        "R, the recipe oracle's",
        "y, the backend's, rounded to bf16",
        "d = y - R",
        "B0, errors that add up",
        "F, flips",
        "hulp, half a bf16 spacing",
        "limit, 2 hulp + B0 + F",
        "E1 = |d| / limit",
    )
    heads = (f"token {TOKEN}, column {COLUMN} of {CASE}", "fp32, declared", "not declared")
    return table(heads, ((text(name), *row) for name, row in zip(names, rows, strict=True)))


def statistics_example() -> str:
    """Every ratio of that output."""
    _, _, found = judged()
    rows = [
        (code(name), *(f"{judgement.statistics[name]:.3f}" for _, judgement in found.values()), text(MEANINGS[name]))
        for name in found[FP32][1].statistics
    ]
    for _, judgement in found.values():
        if not judgement.passed:
            raise ValueError(f"{CASE}: {judgement.reason}")
    return table(("ratio, limit 1", "fp32, declared", "not declared", "above 1 it says"), rows)


def number(value: Tensor) -> str:
    """Nine digits, as fp32 has."""
    return f"{float(value):.9g}"


def constants(module: str) -> str:
    """The numbers that a module of the bounds has with a reason, and the reason."""
    found = import_module(f"conformance.bounds.{module}")
    rows = []
    for assigned, about in pairwise(ast.parse(inspect.getsource(found)).body):
        if not isinstance(assigned, ast.Assign) or not isinstance(about, ast.Expr):
            continue
        (target,), words = assigned.targets, ast.literal_eval(about.value)
        value = getattr(found, target.id) if isinstance(target, ast.Name) else None
        if isinstance(value, (int, float)):
            rows.append((code(ast.unparse(target)), text(ast.unparse(assigned.value)), prose(inspect.cleandoc(words))))
    if not rows:
        raise LookupError(f"{found.__name__} has no constants with a reason")
    return table(("constant", "value", "why"), rows)


def undeclared() -> str:
    """What an arithmetic that nobody declares is judged as."""
    return (
        f"{UNKNOWN.fraction_bits} fraction bits, groups of {UNKNOWN.group} terms, promoted to fp32 every "
        f"{UNKNOWN.promote_every} terms"
    )
