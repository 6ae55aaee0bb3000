"""Which version of a backend is here."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conformance.plan import Subject
from conformance.waivers import release as module
from conformance.waivers.release import LIBRARIES, release
from fp8moe import __version__
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.backends.marlin import MarlinExperts
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.libraries import DISTRIBUTIONS, VLLM_OPS
from fp8moe.registry import Fp8MoeBackend, seed_backends


def subject(cls: type[TorchExperts], origin: str) -> Subject:
    return Subject(cls.__name__, cls, origin)


def vendors(folder: Path, name: str, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> type[TorchExperts]:
    """A class in a module of a folder on the path, with a distribution of it beside."""
    info = folder / f"{name}-2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
    for file, text in metadata.items():
        (info / file).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    made = ModuleType(f"{name}_moe")
    file = folder / f"{name}_moe.py"
    file.touch()
    made.__file__ = str(file)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return type("Experts", (TorchExperts,), {"__module__": made.__name__})


def test_our_own() -> None:
    for cls in (TorchExperts, TritonExperts, type("Local", (TorchExperts,), {"__module__": "no_such_module"})):
        assert str(release(subject(cls, cls.__name__), {})) == f"fp8moe {__version__}"


def test_one_with_an_entry_point() -> None:
    found = release(subject(TorchExperts, "ACME"), {"ACME": "pytest"})
    assert (found.distribution, found.version) == ("pytest", importlib.metadata.version("pytest"))
    gone = release(subject(TorchExperts, "ACME"), {"ACME": "acme-kernels"})
    assert (gone.version, gone.why) == ("", "it is not installed")
    assert str(gone) == "acme-kernels (it is not installed)"


def test_a_class_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = vendors(tmp_path, "waived_acme", {"RECORD": "waived_acme_moe.py,,\n"}, monkeypatch)
    assert str(release(subject(cls, "waived_acme_moe:Experts"), {})) == "waived_acme 2.1"


def test_a_class_of_another_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = vendors(tmp_path, "waived_acme", {"RECORD": "waived_acme_moe.py,,\n"}, monkeypatch)
    sys.modules["waived_acme_moe"].__file__ = str(tmp_path / "elsewhere" / "waived_acme_moe.py")
    assert str(release(subject(cls, "waived_acme_moe:Experts"), {})) == f"fp8moe {__version__}"


@pytest.mark.parametrize("editable", [True, False])
def test_a_class_of_an_editable_checkout(editable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps({"url": (tmp_path / "site").as_uri(), "dir_info": {"editable": editable}})
    cls = vendors(tmp_path / "site", "waived_acme", {"direct_url.json": told}, monkeypatch)
    expected = "waived_acme 2.1" if editable else f"fp8moe {__version__}"
    assert str(release(subject(cls, "waived_acme_moe:Experts"), {})) == expected


def test_the_library_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {spec.backend for spec in seed_backends() if issubclass(spec.experts_cls, LibraryBackend)}
    assert adapters == set(LIBRARIES)
    assert set(LIBRARIES.values()) <= set(DISTRIBUTIONS)
    marlin = Subject("MARLIN", MarlinExperts, "MARLIN")
    known: dict[str, str] = {"vllm": "0.25.1"}

    class Here:
        def version(self, *names: str) -> str | None:
            return next((known[name] for name in names if name in known), None)

    monkeypatch.setattr(module, "Surroundings", Here)
    monkeypatch.setattr(module, "vllms_deep_gemm", lambda: Path("third_party"))
    deep_gemm = next(spec for spec in seed_backends() if spec.backend is Fp8MoeBackend.DEEPGEMM)
    assert str(release(marlin, {}, {})) == "vllm 0.25.1"
    assert str(release(Subject("DEEPGEMM", deep_gemm.experts_cls, "DEEPGEMM"), {}, {})) == "vllm 0.25.1"
    assert "from the folder in FP8MOE_VLLM_OPS" in release(marlin, {}, {VLLM_OPS: "ops"}).why
    known["vllm"] = "nightly"
    assert release(marlin, {}, {}).why == "its version is 'nightly', which no range can be compared with"
    known.clear()
    monkeypatch.setattr(module, "vllms_deep_gemm", lambda: None)
    assert release(marlin, {}, {}).why == "it is not installed"
