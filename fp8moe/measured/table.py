"""`MeasuredTable`: the times of backends on one device, checked, indexed by shape, read from and written to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fp8moe.config import FusedMoEConfig
from fp8moe.counted import counted
from fp8moe.keys import QuantKey
from fp8moe.measured import file
from fp8moe.measured.curves import Curve
from fp8moe.measured.here import device_name_here, installed_versions
from fp8moe.measured.rows import (
    Certificate,
    InvalidMeasuredTable,
    LayerShape,
    MeasuredDevice,
    MeasuredRow,
    ShapeKey,
    check_name,
    key_of,
    refuse,
)
from fp8moe.platforms import Platform
from fp8moe.registry import SEED_ORDER, BackendSpec, registered_backends

MOST_BYTES = 64 << 20
"""Of a table's file."""
KEPT_AT_MOST = 1024


class Fallback(Enum):
    """Why the measured policy leaves the choice to the seed's order."""

    RULE = "RULE"
    """A rule decides before the scan, or nothing is accepted."""
    DEVICE = "DEVICE"
    """The table was measured on another device."""
    VERSIONS = "VERSIONS"
    """The table was measured with other software than is here."""
    SHAPE = "SHAPE"
    """No accepted backend was measured on this layer."""
    CERTIFICATE = "CERTIFICATE"
    """None of those that were is certified."""
    TOKENS = "TOKENS"
    """The number of tokens lies outside the measured range of all those that are."""


@dataclass(frozen=True)
class MeasuredTable:
    """Median times of backends on the layers of one device, and which of the backends are certified.

    A backend is marked certified by an entry of `certificates` whose level is "certify"; without one, or with a lower
    level, it is never picked by measurement.

    Args:
        device: where the times were taken.
        versions: of what took part, by distribution name; "fp8moe" is among them. `installed_versions` gives them.
        rows: in any order; kept sorted.
        certificates: by backend.
        source: how the times were taken, in words.

    Raises:
        InvalidMeasuredTable: (a ValueError) a field is wrong, or two rows are of one backend, shape and tokens.
    """

    device: MeasuredDevice
    versions: Mapping[str, str]
    rows: Sequence[MeasuredRow] = ()
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    source: str = ""

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.device, MeasuredDevice):
            raise refuse("device", self.device, "a MeasuredDevice")
        if not isinstance(self.source, str):
            raise refuse("source", self.source, "a text")
        for name in ("versions", "certificates"):
            if not isinstance(getattr(self, name), Mapping):
                raise refuse(name, getattr(self, name), "a mapping")
        for name, version in self.versions.items():
            check_name("versions", name, "torch")
            check_name(f"versions[{name!r}]", version, "2.13.0")
        if "fp8moe" not in self.versions:
            raise InvalidMeasuredTable("versions", " lacks 'fp8moe': expected its version, and those of what it timed")
        for name, certificate in self.certificates.items():
            check_name("certificates", name, "TRITON")
            if not isinstance(certificate, Certificate):
                raise refuse(f"certificates[{name!r}]", certificate, "a Certificate")
        for row in self.rows:
            if not isinstance(row, MeasuredRow):
                raise refuse("rows", row, "MeasuredRow objects")
        rows = tuple(sorted(self.rows))
        for one, next_one in pairwise(rows):
            if (one.shape, one.tokens, one.backend) == (next_one.shape, next_one.tokens, next_one.backend):
                which = f"{one.backend} at {counted(one.tokens, 'token')} of {one.shape}"
                raise InvalidMeasuredTable("rows", f": {which} is there twice; keep one of the two")
        curves = _curves(rows)
        certified = {key: tuple(one for one in found if self.certified(one.backend)) for key, found in curves.items()}
        kept = {
            "rows": rows,
            "versions": MappingProxyType(dict(self.versions)),
            "certificates": MappingProxyType(dict(self.certificates)),
            "_curves": curves,
            "_certified": certified,
            "_mismatches": {},
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.device, dict(self.versions), self.rows, dict(self.certificates), self.source)

    # -- what the policy asks --

    def certified(self, backend: str) -> bool:
        """The backend has a certificate of the level that counts."""
        certificate = self.certificates.get(backend)
        return certificate is not None and certificate.certified

    def curves(
        self, config: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> tuple[Curve, ...]:
        """The times of every backend that was measured on this layer."""
        found: dict[ShapeKey, tuple[Curve, ...]] = self.__dict__["_curves"]
        return found.get(key_of(config, weight_key, activation_key), ())

    def certified_curves(
        self, config: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> tuple[Curve, ...]:
        """Those of certified backends."""
        found: dict[ShapeKey, tuple[Curve, ...]] = self.__dict__["_certified"]
        return found.get(key_of(config, weight_key, activation_key), ())

    def mismatch(self, platform: Platform, name: str | None, *, here: bool) -> tuple[Fallback, str] | None:
        """Why the table says nothing about a device, or None.

        Args:
            platform: the device; its kind and architecture are compared.
            name: the device's name, compared where given.
            here: the device is the one that is here: its name and the installed versions are compared as well.
        """
        kept: dict[Any, tuple[Fallback, str] | None] = self.__dict__["_mismatches"]
        key = (platform, name, here)
        try:
            return kept[key]
        except KeyError:
            pass
        if len(kept) >= KEPT_AT_MOST:
            kept.clear()
        kept[key] = found = self._mismatch(platform, name, here)
        return found

    def _mismatch(self, platform: Platform, name: str | None, here: bool) -> tuple[Fallback, str] | None:
        differs = self.device.differs(platform, device_name_here() if here and name is None else name)
        if differs is not None:
            return Fallback.DEVICE, differs
        if here:
            installed = installed_versions(*self.versions)
            for package, version in self.versions.items():
                if installed.get(package) != version:
                    told = installed.get(package, "not installed")
                    return Fallback.VERSIONS, f"it was measured with {package} {version}, here it is {told}"
        return None

    # -- other tables --

    def without(self, shape: LayerShape, tokens: int) -> MeasuredTable:
        """The same table without the rows at one number of tokens of one layer."""
        left = tuple(row for row in self.rows if (row.shape, row.tokens) != (shape, tokens))
        return MeasuredTable(self.device, self.versions, left, self.certificates, self.source)

    # -- files --

    def dumps(self) -> str:
        """The text of the table's file."""
        return file.written(self.device, self.versions, self.rows, self.certificates, self.source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table's file."""
        Path(path).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def loads(cls, text: str, *, where: str = "the table", backends: Sequence[BackendSpec] = ()) -> MeasuredTable:
        """A table from the text of its file.

        Args:
            where: names the file in errors.
            backends: candidates that are known beside the registry's.

        Raises:
            InvalidMeasuredTable: (a ValueError) another format, an edited or cut text, an unknown backend, a value
                that is wrong; the text names the place.
        """
        known = frozenset(name for name, *_ in SEED_ORDER) | {spec.name for spec in registered_backends()}
        content = file.read(text, where, known | {spec.name for spec in backends})
        try:
            return cls(*content)
        except InvalidMeasuredTable as error:
            raise InvalidMeasuredTable(f"{where}: {error.field}", error.problem) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backends: Sequence[BackendSpec] = ()) -> MeasuredTable:
        """A table from its file; arguments and errors as `loads`.

        Raises:
            InvalidMeasuredTable: (a ValueError) the file cannot be read, too.
        """
        try:
            with open(path, "rb") as given:
                content = given.read(MOST_BYTES + 1)
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise InvalidMeasuredTable(os.fspath(path), f" cannot be read: {reason}; give a file of save()") from None
        if len(content) > MOST_BYTES:
            raise InvalidMeasuredTable(os.fspath(path), f" has more than {MOST_BYTES >> 20} MiB; give a file of save()")
        return cls.loads(text, where=os.fspath(path), backends=backends)


def _curves(rows: Sequence[MeasuredRow]) -> dict[ShapeKey, tuple[Curve, ...]]:
    times: dict[LayerShape, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        times.setdefault(row.shape, {}).setdefault(row.backend, []).append((row.tokens, row.us))
    return {
        shape.key: tuple(Curve.of(backend, points) for backend, points in columns.items())
        for shape, columns in times.items()
    }
