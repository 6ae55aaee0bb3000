"""Faults of memory in our own kernels: no output shows them, only a sanitizer does."""

from __future__ import annotations

from conformance.zoo.mutated import Edit, kernel_fault

MEMORY = (
    kernel_fault(
        "reads_past_the_weights",
        "the last step along K loads whole blocks of W; what lies past a row's end is multiplied by zero",
        "gemm",
        "grouped_gemm",
        Edit("mask=in_k[:, None] & in_range[None, :]", "mask=in_range[None, :]"),
    ),
    kernel_fault(
        "reads_unwritten_rows",
        "the weighted sum loads the rows of pairs without an expert here, which nothing has written, and drops them",
        "combine",
        "reduce",
        Edit("mask = column < tl.where(there, columns, 0)", "mask = column < columns"),
    ),
)
