"""Times of cases as rows of a measured table, by what of a layer decides about its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conformance.build import config_of
from conformance.cases import Case
from conformance.models import model_and_split
from fp8moe.measured.rows import LayerShape, MeasuredRow

VERSIONS = ("fp8moe", "torch", "triton")
"""That a table is of."""
SOURCE = "fp8moe measure: interquartile means of rounds of graph replays, on as many layers as no cache holds"


def rows_of(times: Iterable[tuple[Case, Mapping[str, float]]]) -> tuple[MeasuredRow, ...]:
    """Of each case the microseconds by backend; a class that is named by its module has no row, since nothing selects
    it."""
    rows: dict[tuple[LayerShape, int, str], MeasuredRow] = {}
    for case, column in times:
        shape, tokens = shape_of(case), max(case.tokens // ranks(case), 1)
        for name, us in column.items():
            if ":" not in name:
                rows.setdefault((shape, tokens, name), MeasuredRow(shape, tokens, name, round(us, 2)))
    return tuple(rows.values())


def ranks(case: Case) -> int:
    """Over how many ranks the experts are divided: a rank has so many times fewer pairs than tokens times top-k."""
    return case.ep_size if case.model is None else model_and_split(case.model)[1].ep_size


def shape_of(case: Case) -> LayerShape:
    """A row's."""
    config = config_of(case)
    return LayerShape(
        config.num_local_experts,
        config.experts_per_token,
        config.hidden_dim,
        config.intermediate_size_per_partition,
        case.scheme,
        case.activation,
    )
