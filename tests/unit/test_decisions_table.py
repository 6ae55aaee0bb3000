"""The decision table: rules that say exactly what is decided in every cell, and the same rules every time."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import conformance
from conformance.decisions import table
from conformance.decisions.decided import Decided, DecisionsError, decide_grid
from conformance.decisions.declared import axis_values, cell_numbers, distinct_cells, grid_digest, once_each
from conformance.decisions.kept import Kept, read
from conformance.decisions.labels import label_of, outcome_text, parse_label, rule_text
from conformance.decisions.table import Rule, Table
from conformance.decisions.words import condition, in_words
from conformance.selection.axes import AXES, AXIS
from conformance.selection.cells import Cell
from conformance.selection.grid import GRID, Product, cell_keys
from conformance.selection.model import RULES
from conformance.selection.outcomes import OTHER_ERROR, Classifier
from conformance.selection.runner import Job, Task
from conformance.zoo.selection.mutants import MUTANTS
from fp8moe import explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.registry import seed_backends
from tests.unit.decision_grids import SMALL, as_specified, cells_of, fits

SIZE = 100_000


@pytest.fixture(scope="module")
def small() -> Decided:
    """The selector's own decisions on the small grid."""
    return decide_grid(products=SMALL, processes=0)


# -- what the selector decides --


def test_rule_seen_is_the_rule_explained() -> None:
    backends = seed_backends()
    task = Task(partial(select_fp8_moe_backend, backends=backends), Classifier(backends), SMALL)
    met = set()
    for index, product in enumerate(SMALL):
        numbers = np.arange(product.size)
        plain, (outcomes, rules) = task.outcomes(Job(index, numbers)), task.outcomes(Job(index, numbers, ruled=True))
        assert outcomes.tolist() == plain.tolist()
        explained = [
            explain_fp8_moe_backend(*cell[:4], platform=cell.platform, env=cell.env, backends=backends).rule
            for cell in (product.cell(number).arguments for number in numbers.tolist())
        ]
        assert [RULES[code] for code in rules] == explained
        met |= set(explained)
    assert met == {"R1", "R3c", "R4", "R4b", "R8", "R9"}


def test_watching_leaves_the_selector_as_it_was() -> None:
    from fp8moe import selector

    before = selector.decide
    decide_grid(products=SMALL[2:], processes=0)
    assert selector.decide is before


def test_labels_are_read_back() -> None:
    for outcome in (0, 7, 11, OTHER_ERROR, 100, 209):
        for rule in range(len(RULES)):
            label = label_of(outcome, rule)
            assert parse_label(outcome_text(label), rule_text(label)) == label
    with pytest.raises(ValueError, match="'nonsense' is not one"):
        parse_label("nonsense", "R8")
    with pytest.raises(ValueError, match="'R99' is none of R1"):
        parse_label("TRITON", "R99")


# -- the grid --


def test_cells_are_numbered_alike_in_every_product() -> None:
    keys = cell_keys(SMALL)
    assert np.concatenate([cell_numbers(product) for product in SMALL]).tolist() == keys.tolist()
    assert distinct_cells(SMALL) == len(set(keys.tolist())) == sum(int(once.sum()) for once in once_each(SMALL))
    product = SMALL[1]
    some = np.asarray([0, 5, product.size - 1])
    assert cell_numbers(product, some).tolist() == cell_numbers(product)[some].tolist()
    assert axis_values(cell_numbers(product, some)).T.tolist() == [list(product.cell(n).indices) for n in some]


def test_digest_tells_grids_apart() -> None:
    digests = {grid_digest(products) for products in (GRID, GRID[1:], GRID[::-1], SMALL)}
    assert len(digests) == 4


# -- exactness --


def test_kept_table_says_what_the_specification_says_of_every_cell() -> None:
    kept = read()
    assert not any(len(numbers) for numbers in kept.table.expand().differs(as_specified()))
    assert kept.cells == distinct_cells(GRID)
    assert len(kept.render().encode()) <= SIZE


def test_first_rule_that_fits_a_cell_says_what_is_decided(small: Decided) -> None:
    made = Table.of(small, SMALL)
    for index, number, names in cells_of(SMALL):
        first = next(rule for rule in made.rules if fits(rule.when, names))
        assert first.label == small.labels[index][number], Cell.of(**names)


def test_selectors_other_than_ours_have_exact_tables_too() -> None:
    for name in ("lora_ignored", "format_always_standard"):
        decided = decide_grid(MUTANTS[name].make()[0], products=SMALL, processes=0)
        assert not any(map(len, Table.of(decided, SMALL).expand(SMALL).differs(decided)))


def test_irregular_decisions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    irregular = Decided(tuple(np.arange(product.size, dtype=np.uint16) * 7919 % 251 for product in SMALL[1:2]))
    assert not any(map(len, Table.of(irregular, SMALL[1:2]).expand(SMALL[1:2]).differs(irregular)))
    monkeypatch.setattr(table, "RULES_AT_MOST", 100)
    with pytest.raises(DecisionsError, match="more than 100 rules"):
        Table.of(irregular, SMALL[1:2])


def test_cell_decided_in_two_ways_is_named(small: Decided) -> None:
    twice = (SMALL[2], SMALL[2])
    labels = small.labels[2]
    other = labels.copy()
    other[3] ^= 1
    with pytest.raises(DecisionsError, match=f"^{SMALL[2].cell(3)} is decided in two ways"):
        Table.of(Decided((labels, other)), twice)


def test_rules_of_other_axes_are_adapted() -> None:
    there = Rule({"scheme": ("block", "fp2"), "lora": ("no",)}, 7)
    gone = (Rule({"moon": ("full",)}, 8), Rule({"scheme": ("fp2",)}, 9), Rule({"moon": ()}, 9))
    assert Table((*gone, there)).adapted().rules == (Rule({"scheme": ("block",), "lora": ("no",)}, 7),)


def test_cell_that_no_rule_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rule fits some cells of the product 'layers'"):
        Table((Rule({"lora": ("yes",)}, 7),)).expand(SMALL[1:2])


# -- determinism --


def test_same_decisions_give_the_same_bytes_in_another_process(small: Decided) -> None:
    kept = Kept(Table.of(small, SMALL), grid_digest(SMALL), distinct_cells(SMALL), ())
    code = """
import sys
from conformance.decisions.decided import decide_grid
from conformance.decisions.declared import distinct_cells, grid_digest
from conformance.decisions.kept import Kept
from conformance.decisions.table import Table
from tests.unit.decision_grids import SMALL
made = Table.of(decide_grid(products=SMALL, processes=0), SMALL)
sys.stdout.write(Kept(made, grid_digest(SMALL), distinct_cells(SMALL), ()).render())
"""
    root = str(Path(conformance.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == kept.render(), done.stderr


# -- words --


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("scheme", ["block"], "scheme = block"),
        ("gating", ["non-gated"], "gating = non-gated"),
        ("activation", [name for name in AXES[AXIS["activation"]].names if name != "silu"], "activation not silu"),
        ("device", ["sm70", "xpu"], "device in {sm70, xpu}"),
        ("device", [name for name in AXES[AXIS["device"]].names if name.startswith("sm90")], "device = sm90*"),
        ("device", ["sm90", "sm90-cuda12.3"], "device in {sm90, sm90-cuda12.3}"),
        ("libraries", ["none"], "without deep_gemm and flashinfer and aiter and vllm"),
        ("libraries", [n for n in AXES[AXIS["libraries"]].names if n == "all" or "vllm" in n], "with vllm"),
        ("libraries", ["vllm", "aiter"], "libraries in {aiter, vllm}"),
        ("VLLM_USE_DEEP_GEMM", ["unset"], "VLLM_USE_DEEP_GEMM unset"),
        ("VLLM_USE_DEEP_GEMM", ["0", "-0", "00", "blank-0", "unset"], "VLLM_USE_DEEP_GEMM unset or off"),
        ("VLLM_USE_DEEP_GEMM", ["1", "01"], "VLLM_USE_DEEP_GEMM in {1, 01}"),
        ("VLLM_FLASHINFER_MOE_BACKEND", ["latency"], "VLLM_FLASHINFER_MOE_BACKEND latency"),
    ],
)
def test_condition_in_words(axis: str, values: list[str], words: str) -> None:
    assert condition(axis, values) == words


def test_conditions_stand_in_the_order_of_the_axes() -> None:
    assert in_words({"lora": ("yes",), "scheme": ("block",)}) == "scheme = block, lora = yes"


def test_products_of_the_small_grid_share_cells() -> None:
    assert distinct_cells(SMALL) < sum(product.size for product in SMALL)
    assert all(isinstance(product, Product) for product in SMALL)
