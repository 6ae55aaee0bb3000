"""What a table of times is made of: a layer's shape, a measured row, the device, a backend's certificate."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from fp8moe.config import ACTIVATIONS, NON_GATED_ACTIVATIONS, FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.schemes import SCHEMES, scheme_name

LEVELS = ("smoke", "quick", "certify")
"""Of `check_backend`, in the order of what they go through."""
CERTIFIED_AT = "certify"
"""The level from which on a backend counts as certified."""
FORMATS = {
    "standard": FusedMoEActivationFormat.Standard,
    "batched": FusedMoEActivationFormat.BatchedExperts,
}
LARGEST = (1 << 63) - 1

ShapeKey = tuple[int, int, int, int, QuantKey | None, QuantKey | None, str, bool, FusedMoEActivationFormat]


class InvalidMeasuredTable(ValueError):
    """A table of times, or a part of one, is not what it must be; `field` names the part."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}{problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.field, self.problem)


def refuse(field: str, value: object, expected: str) -> InvalidMeasuredTable:
    """The error for a field whose value is wrong."""
    return InvalidMeasuredTable(field, f"={quoted(value)}: expected {expected}")


def quoted(value: object) -> str:
    """A value in an error; a long one is cut."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def check_count(field: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise refuse(field, value, "an integer of at least 1, below 2**63")


def check_name(field: str, value: object, example: str) -> None:
    if not isinstance(value, str) or not value.strip() or value != value.strip():
        raise refuse(field, value, f"a text such as {example!r}, without blanks around it")


def check_one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise refuse(field, value, f"one of {', '.join(known)}")


@dataclass(frozen=True, order=True)
class LayerShape:
    """What of a layer decides about its time.

    Args:
        experts: experts that the device holds.
        top_k: experts of a token.
        hidden: H.
        intermediate: I, after the tensor-parallel split.
        scheme: quantisation scheme, a name of `fp8moe.schemes.SCHEMES`.
        activation: a name of `fp8moe.config.ACTIVATIONS`; whether the MLP is gated follows from it.
        format: "standard" or "batched", the layout in which activations reach the experts.

    Not in it, and so the same for every row of a table: the dtype of the activations, bias, routing.

    Raises:
        InvalidMeasuredTable: (a ValueError) a count below 1, or an unknown name.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    scheme: str
    activation: str = "silu"
    format: str = "standard"

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "hidden", "intermediate"):
            check_count(name, getattr(self, name))
        check_one_of("scheme", self.scheme, tuple(SCHEMES))
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_one_of("format", self.format, tuple(FORMATS))

    @property
    def gated(self) -> bool:
        return self.activation not in NON_GATED_ACTIVATIONS

    @property
    def key(self) -> ShapeKey:
        """What `key_of` gives for a configuration of this shape."""
        weight_key, activation_key = SCHEMES[self.scheme]
        sizes = (self.experts, self.top_k, self.hidden, self.intermediate)
        return (*sizes, weight_key, activation_key, self.activation, self.gated, FORMATS[self.format])

    def __str__(self) -> str:
        sizes = f"E={self.experts} k={self.top_k} H={self.hidden} I={self.intermediate}"
        return f"{sizes} {self.scheme} {self.activation} {self.format}"


def key_of(config: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None) -> ShapeKey:
    """The shape of a configuration, as an index has it."""
    facets = config.facets
    return (
        config.num_local_experts,
        config.experts_per_token,
        config.hidden_dim,
        config.intermediate_size_per_partition,
        weight_key,
        activation_key,
        facets.activation,
        facets.is_act_and_mul,
        facets.activation_format,
    )


def key_in_words(key: ShapeKey) -> str:
    """A shape that may be in no table, as `LayerShape` prints it."""
    experts, top_k, hidden, intermediate, weight_key, activation_key, activation, gated, layout = key
    layout_name = next(name for name, value in FORMATS.items() if value is layout)
    usual = gated == (activation not in NON_GATED_ACTIVATIONS)
    odd = "" if usual else " gated" if gated else " not gated"
    sizes = f"E={experts} k={top_k} H={hidden} I={intermediate}"
    return f"{sizes} {scheme_name(weight_key, activation_key)} {activation}{odd} {layout_name}"


@dataclass(frozen=True, order=True)
class MeasuredRow:
    """One median time: `backend` on `tokens` tokens of a layer, in microseconds.

    Tokens count as if all their experts were here: a rank that holds a part of the experts has as many tokens as
    token-expert pairs over top-k.

    Raises:
        InvalidMeasuredTable: (a ValueError) tokens below 1, a time that is not positive and finite, no name.
    """

    shape: LayerShape
    tokens: int
    backend: str
    us: float

    def __post_init__(self) -> None:
        if not isinstance(self.shape, LayerShape):
            raise refuse("shape", self.shape, "a LayerShape")
        check_count("tokens", self.tokens)
        check_name("backend", self.backend, "TRITON")
        try:
            us = float(self.us) if type(self.us) in (int, float) else math.nan
        except OverflowError:
            us = math.inf
        if not (math.isfinite(us) and us > 0):
            raise refuse("us", self.us, "a positive, finite number of microseconds")
        object.__setattr__(self, "us", us)


@dataclass(frozen=True)
class MeasuredDevice:
    """The device of a table: its name as the driver gives it, its kind and architecture as `Platform` has them."""

    name: str
    kind: str
    architecture: str

    def __post_init__(self) -> None:
        check_name("device.name", self.name, "NVIDIA H200")
        check_name("device.kind", self.kind, "cuda")
        check_name("device.architecture", self.architecture, "sm90")

    def differs(self, platform: Platform, name: str | None) -> str | None:
        """How another device differs, in words; None where it does not.

        Features after a colon, as in "gfx942:sramecc+", do not count. `name` None: only kind and architecture do.
        """
        here = (platform.kind, _plain(platform.architecture))
        if here != (self.kind, _plain(self.architecture)):
            return f"this is {' '.join(here)}, the table is of {self}"
        if name is not None and name.strip() != self.name:
            return f"this is {name}, the table is of {self}"
        return None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {self.architecture})"


def _plain(architecture: str) -> str:
    return architecture.partition(":")[0]


@dataclass(frozen=True)
class Certificate:
    """What a backend's numbers were judged with: the reference to a passed report of `check_backend`.

    Args:
        level: the level that it passed: smoke, quick or certify. Only "certify" lets a backend be picked.
        date: of the run, YYYY-MM-DD.
        report: SHA-256 of the report's bytes, 64 hexadecimal digits.
    """

    level: str
    date: str
    report: str

    def __post_init__(self) -> None:
        check_one_of("level", self.level, LEVELS)
        if not isinstance(self.date, str) or not _is_date(self.date):
            raise refuse("date", self.date, "a day such as 2026-11-24")
        if not isinstance(self.report, str) or not re.fullmatch("[0-9a-f]{64}", self.report):
            raise refuse("report", self.report, "the report's SHA-256, 64 hexadecimal digits in lower case")

    @property
    def certified(self) -> bool:
        return self.level == CERTIFIED_AT

    @classmethod
    def of_report(cls, report: bytes, device: MeasuredDevice, versions: Mapping[str, str]) -> tuple[str, Certificate]:
        """The backend and its certificate, from the bytes of a report that `fp8moe check --report` wrote.

        Raises:
            InvalidMeasuredTable: (a ValueError) no such report, one that did not pass or not without waivers, or one of
                another device or of other versions than `versions`, those of the table.
        """
        try:
            told: Any = json.loads(report)
        except (ValueError, RecursionError) as error:
            raise InvalidMeasuredTable(
                "report", f": no JSON ({error}); give the file of fp8moe check --report"
            ) from None
        if not isinstance(told, dict) or not told.keys() >= _REPORTED:
            raise InvalidMeasuredTable("report", ": no report of one backend; give the file of fp8moe check --report")
        if told["verdict"] != "passed":
            raise refuse("report.verdict", told["verdict"], "'passed'; run fp8moe check until it is")
        checks: Any = told.get("checks")
        waived = sum(
            isinstance(check, dict) and check.get("status") == "waived"
            for check in (checks if isinstance(checks, list) else ())
        )
        if waived:
            raise refuse("report.checks", f"{waived} waived", "none; nothing is picked by itself that is known to fail")
        for field, expected in (("target", device.kind), ("device", device.name)):
            if told[field] != expected:
                raise refuse(f"report.{field}", told[field], f"{expected!r}, as the table's device; certify it there")
        reported = told["versions"] if isinstance(told["versions"], dict) else {}
        for name, version in versions.items():
            if reported.get(name) != version:
                raise refuse(f"report.versions[{name!r}]", reported.get(name), f"{version!r}, as here; certify it anew")
        check_name("report.backend", told["backend"], "TRITON")
        day = str(told["date"])[: len("2026-11-24")]
        return told["backend"], cls(told["level"], day, hashlib.sha256(report).hexdigest())


_REPORTED = {"backend", "level", "verdict", "target", "device", "versions", "date"}
"""Fields of a report that a certificate rests on."""


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
