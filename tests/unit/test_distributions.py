"""Which distribution a certificate says that a backend came from: found without an import of the backend."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.certificate.page import page
from conformance.certificate.surroundings import brought_by, distribution_of
from conformance.certificate.verifying import verify
from fp8moe import __version__
from tests.unit.certificates import SMALL, forged, written

RAISES = "raise RuntimeError('a backend is imported in a worker alone')\n"


def installed(site: Path, source: Path, *, editable: bool, entry_points: str = "") -> None:
    """A distribution acme-moe 2.1 of the package acme_moe, which lies in `source`; as hatchling leaves it."""
    package = source / "acme_moe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(RAISES)
    (package / "experts.py").write_text(RAISES)
    info = site / "acme_moe-2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-moe\nVersion: 2.1\n")
    files = ["_acme_moe.pth"] if editable else ["acme_moe/__init__.py", "acme_moe/experts.py"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "acme_moe-2.1.dist-info/RECORD"]))
    if editable:
        told = {"url": source.as_uri(), "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(told))
    if entry_points:
        (info / "entry_points.txt").write_text(f"[fp8moe.backends]\n{entry_points}\n")


@pytest.mark.parametrize("editable", [True, False])
@pytest.mark.parametrize("origin", ["acme_moe.experts:AcmeExperts", "acme_moe:AcmeExperts", "ACME_MOE"])
def test_of_an_installed_package(origin: str, editable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    source = tmp_path / "source" if editable else site
    installed(site, source, editable=editable, entry_points="ACME_MOE = acme_moe.experts:AcmeExperts")
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(source)
    found = distribution_of(origin)
    assert found is not None
    assert (found["name"], found["version"], len(found["record_sha256"])) == ("acme-moe", "2.1", 64)
    assert brought_by({"distribution": found}) == "acme-moe 2.1"
    assert "acme_moe" not in sys.modules


def test_a_folder_beside_an_installed_package_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, beside = tmp_path / "site", tmp_path / "beside"
    installed(site, site, editable=False)
    (beside / "acme_moe").mkdir(parents=True)
    (beside / "acme_moe" / "__init__.py").touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(beside)
    assert distribution_of("acme_moe.experts:AcmeExperts") is None


def test_of_our_own_and_of_none() -> None:
    for origin in ("TRITON", "fp8moe.backends.torch_experts:TorchExperts"):
        assert brought_by({"distribution": distribution_of(origin)}) == f"fp8moe {__version__}"
    assert distribution_of("no_such_package:Experts") is None
    assert brought_by({"distribution": None}) == ""


@pytest.mark.parametrize(
    ("own", "release", "origin", "told"),
    [
        ({"name": "toy", "version": "1"}, "toy", "TOY", "toy 1"),
        ({"name": "toy", "version": "1"}, "deep_gemm", "TOY", "toy 1, with the kernels of deep_gemm 1"),
        (None, "fp8moe", "toy:TOY", "none that is installed, so it cannot be named"),
        (None, "deep_gemm", "TOY", f"fp8moe {__version__}, not installed, with the kernels of deep_gemm 1"),
    ],
)
def test_the_pages_top_tells_the_package(
    own: dict[str, str] | None, release: str, origin: str, told: str, tmp_path: Path
) -> None:
    def change(evidence: dict[str, Any]) -> None:
        evidence["distribution"], evidence["report"]["origin"] = own, origin
        evidence["suite"]["version"] = __version__
        evidence["release"] = {"distribution": release, "version": "1", "why": ""}

    forged(written(tmp_path / "certificate"), change)
    text = page(verify(tmp_path / "certificate", editions=lambda _name: SMALL))
    head = text[: text.index("<nav")]
    assert f"<dt>package</dt><dd>{told}</dd>" in head
