"""`fp8moe schema [NAME]`: the JSON Schema of a file that the suite writes or reads, or which there are."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from conformance.schemas import OF, schema
from fp8moe.commands import tables
from fp8moe.commands.question import pick


def named(name: str) -> dict[str, Any]:
    """
    Raises:
        BadInput: there is none of this name.
    """
    return schema(pick("schema", name, OF))


def print_names() -> None:
    table = tables.table("JSON Schemas, draft 2020-12", "name", "$id", "of")
    for name, what in OF.items():
        table.add_row(name, Text(schema(name)["$id"]), Text(what))
    tables.console().print(table)
