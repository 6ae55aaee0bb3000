"""JSON Schemas (draft 2020-12) of the files that the suite writes and reads, one file each, for other tools.

The readers do not use them: `tests/unit/test_schemas.py` holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

OF: Mapping[str, str] = {
    "report": "fp8moe check --report FILE",
    "evidence": "a certificate's evidence.json.gz, unpacked",
    "statement": "the payload of a certificate's statement.dsse.json",
    "envelope": "a certificate's statement.dsse.json",
    "rounds": "a certificate's rounds.json",
    "measured": "fp8moe measure --out FILE, and a certificate's times.json",
    "waivers": "a file of waivers, as the values that its TOML comes to",
}
"""What each is of."""
REFERS: Mapping[str, tuple[str, ...]] = {"evidence": ("report",)}
"""Schemas that one refers to by their $id."""


def schema(name: str) -> dict[str, Any]:
    """A schema that needs no other file: those that it refers to are among its definitions.

    Raises:
        KeyError: there is none of this name.
    """
    own = _read(name)
    others = {other: schema(other) for other in REFERS.get(name, ())}
    return {**own, "$defs": {**own["$defs"], **others}} if others else own


def _read(name: str) -> dict[str, Any]:
    if name not in OF:
        raise KeyError(name)
    found: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return found
