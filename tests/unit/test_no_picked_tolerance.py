"""No check has a tolerance that was picked: what an error is compared with is derived, and every constant says whence.

The tests read the source of the suite. They cannot tell a derived bound from a wrong one; they tell that nobody wrote a
number beside an error, and that a number which enters a bound has its derivation next to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import conformance

ROOT = Path(conformance.__file__).parent
JUDGES = (
    *sorted((ROOT / "bounds").glob("*.py")),
    *(ROOT / name for name in ("computes.py", "trial.py", "bits.py", "tokens.py")),
    *sorted((ROOT / "relations").glob("*.py")),
)
"""What decides about an output."""
EVERYTHING = tuple(path for path in sorted(ROOT.rglob("*.py")) if "zoo" not in path.relative_to(ROOT).parts)
"""The zoo is judged, and judges nothing."""
TOLERANT_KEYWORDS = {"rtol", "atol", "rel_tol", "abs_tol"}
TOLERANT_CALLS = {"assert_close", "allclose", "isclose", "approx", "assert_allclose", "assert_almost_equal"}
PLAIN = (0.0, 0.5, 1.0)
"""No error, half of a limit, the limit of every ratio."""
COMPARED: dict[tuple[str, str], str] = {}
"""(file, expression) of comparisons with another float, and why each is no tolerance. None is needed today."""
UNDOCUMENTED: dict[tuple[str, str], str] = {
    ("accumulation.py", "FP32_FRACTION_BITS"): "the definition of the format",
}
"""(file, name) of constants in bounds without a docstring, and why they need none."""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def tolerances(tree: ast.AST) -> list[str]:
    """Calls that compare within a tolerance, in source form."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (called(node) in TOLERANT_CALLS or any(keyword.arg in TOLERANT_KEYWORDS for keyword in node.keywords))
    ]


def number(node: ast.expr) -> float | None:
    """What a literal comes to: a float, its negative, or arithmetic on literals with a float among them; else None."""
    parts = [part for part in ast.walk(node) if isinstance(part, (ast.Constant, ast.Name, ast.Attribute, ast.Call))]
    if not parts or not all(isinstance(part, ast.Constant) and type(part.value) in (int, float) for part in parts):
        return None
    fractional = any(isinstance(part, ast.BinOp) and isinstance(part.op, (ast.Div, ast.Pow)) for part in ast.walk(node))
    if not fractional and not any(type(part.value) is float for part in parts if isinstance(part, ast.Constant)):
        return None
    return float(eval(compile(ast.Expression(node), "literal", "eval")))


def literal_comparisons(tree: ast.AST) -> Iterator[str]:
    """Comparisons with a float literal other than the plain ones, in source form."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [number(side) for side in (node.left, *node.comparators)]
            if any(side is not None and side not in PLAIN for side in sides):
                yield ast.unparse(node)


def constants(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Names of module-level numbers, and whether a docstring follows."""
    for place, node in enumerate(tree.body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        if not targets or value is None or not _numeric(value):
            continue
        following = tree.body[place + 1] if place + 1 < len(tree.body) else None
        told = (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, told


def _numeric(value: ast.expr) -> bool:
    """A number, or arithmetic on numbers and names."""
    inner = list(ast.walk(value))
    allowed = (ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
    if not all(isinstance(part, allowed) for part in inner):
        return False
    return any(isinstance(part, ast.Constant) and type(part.value) in (int, float) for part in inner)


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_compares_within_a_tolerance(path: Path) -> None:
    assert tolerances(tree_of(path)) == []


@pytest.mark.parametrize("path", JUDGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_compared_with_a_literal(path: Path) -> None:
    found = [text for text in literal_comparisons(tree_of(path)) if (path.name, text) not in COMPARED]
    assert found == []


@pytest.mark.parametrize("path", sorted((ROOT / "bounds").glob("*.py")), ids=lambda path: path.name)
def test_every_constant_of_a_bound_says_where_it_comes_from(path: Path) -> None:
    silent = [name for name, told in constants(tree_of(path)) if not told]
    assert [name for name in silent if (path.name, name) not in UNDOCUMENTED] == []


def test_exceptions_are_needed() -> None:
    known = {(path.name, text) for path in JUDGES for text in literal_comparisons(tree_of(path))}
    assert set(COMPARED) <= known
    silent = {
        (path.name, name)
        for path in (ROOT / "bounds").glob("*.py")
        for name, told in constants(tree_of(path))
        if not told
    }
    assert set(UNDOCUMENTED) <= silent


@pytest.mark.parametrize(
    "planted",
    [
        "torch.testing.assert_close(a, b)",
        "torch.allclose(got, expected)",
        "if not math.isclose(x, y): pass",
        "compare(a, b, atol=0)",
        "value == pytest.approx(3)",
    ],
)
def test_a_tolerance_is_seen(planted: str) -> None:
    assert len(tolerances(ast.parse(planted))) == 1


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("passed = error / bound < 1.05", True),
        ("passed = 1e-3 >= error", True),
        ("passed = error <= 2 * 1e-2", True),
        ("passed = error <= 1 / 40", True),
        ("passed = error <= 2 ** -8", True),
        ("passed = error > -0.02", True),
        ("passed = ratio <= 1", False),
        ("passed = ratio <= 1.0", False),
        ("suspicious = ratio > 1 / 2", False),
        ("nothing = error == 0", False),
        ("short = terms <= 16", False),
        ("passed = error <= LIMIT", False),
    ],
)
def test_a_literal_beside_an_error_is_seen(planted: str, seen: bool) -> None:
    assert bool(list(literal_comparisons(ast.parse(planted)))) is seen


def test_a_silent_constant_is_seen() -> None:
    source = 'SLACK = 1.5\nTOLD = 2.0**-24\n"""Unit roundoff."""\nHALF: float = TOLD / 2\nNAMES = ("a", "b")\n'
    assert list(constants(ast.parse(source))) == [("SLACK", False), ("TOLD", True), ("HALF", False)]
