"""Files of waivers, as a vendor would write them."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path

from conformance.waivers.waiver import utc_today

TODAY = date(2026, 3, 1)
FIELDS = {
    "check": "computes.equivalence",
    "case": "scheme=block,k=8",
    "backend": "ACME",
    "backend_version": ">=1.2,<1.4",
    "device": "NVIDIA H200*",
    "reason": "the tail of a group is added twice",
    "tracker": "https://tracker.example/12",
    "owner": "Kernels team",
    "expires": "2026-04-01",
}


def written(*waivers: dict[str, object]) -> str:
    """TOML; a field that is None is left out, one that is a `Raw` stands as it is."""
    lines = []
    for waiver in waivers:
        lines.append("[[waiver]]")
        for name, value in (FIELDS | waiver).items():
            if value is not None:
                lines.append(f"{name} = {value if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


class Raw(str):
    """TOML as it stands."""


def in_days(days: int) -> str:
    return (utc_today() + timedelta(days=days)).isoformat()


def in_folder(folder: Path, *waivers: dict[str, object]) -> Path:
    path = folder / "waivers.toml"
    path.write_text(written(*waivers), encoding="utf-8")
    return path
