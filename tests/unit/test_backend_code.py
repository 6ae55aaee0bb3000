"""The digest of a backend's code: every edit of what is imported shows in it, and nothing else does."""

from __future__ import annotations

import os
import py_compile
import shutil
import sys
import zipfile
from abc import ABC
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conformance import backend_code
from conformance.backend_code import UNKNOWN, UNTOLD, Code, code_of, difference, package_of
from conformance.contain import Limits, SubjectRef
from conformance.distributions import modules_of
from fp8moe.backends.torch_experts import TorchExperts

ASKED: Any = SimpleNamespace(call=lambda *_, **__: ("acme-moe", "1", ""), limits=Limits())
"""In place of a worker, which would say of which release the backend is."""


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On the import path."""
    (tmp_path / "path").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield tmp_path / "path"
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_code"]:
        del sys.modules[name]


def code(*modules: str, named: str = "acme_code.experts:Experts") -> Code:
    return code_of(ASKED, SubjectRef.named(named), modules)


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def without_init(path: Path) -> Path:
    write(path / "acme_code" / "experts.py")
    return write(path / "acme_code" / "kernels.py")


def bytecode_alone(path: Path) -> Path:
    for name in ("__init__", "experts"):
        py_compile.compile(str(write(path / "source.py")), cfile=str(path / "acme_code" / f"{name}.pyc"))
    return path / "acme_code" / "experts.pyc"


def archive(path: Path) -> Path:
    with zipfile.ZipFile(path / "acme.zip", "w") as made:
        made.writestr("acme_code/__init__.py", "")
    sys.path.insert(0, str(path / "acme.zip"))  # that of `syspath_prepend`, which puts it back
    return path / "acme.zip"


def linked_folder(path: Path) -> Path:
    write(path / "acme_code" / "__init__.py")
    kernels = write(path.parent / "elsewhere" / "kernels.py")
    (path / "acme_code" / "kernels").symlink_to(kernels.parent)
    (path / "acme_code" / "round").symlink_to("..")
    (path / "acme_code" / "no_file.py").symlink_to("x" * 300)  # cannot be looked at, as below a folder that is closed
    return kernels


def links_into_a_store(path: Path) -> Path:
    (path / "acme_code").mkdir()
    for name in ("__init__", "experts"):
        (path / "acme_code" / f"{name}.py").symlink_to(write(path.parent / "store" / f"digest-of-{name}"))
    return path.parent / "store" / "digest-of-experts"


@pytest.mark.parametrize("made", [without_init, bytecode_alone, archive, linked_folder, links_into_a_store])
def test_an_edit_shows(made: Callable[[Path], Path], path: Path) -> None:
    file = made(path)
    before = code("acme_code.experts")
    os.utime(file, (1, 1))
    assert (code("acme_code.experts"), before.changed()) == (before, "")
    assert difference(before.told, before.told) == ""
    with file.open("ab") as edited:
        edited.write(b"\n")
    assert "the SHA-256 of its source" in difference(before.told, code("acme_code.experts").told)
    assert before.changed().startswith("acme_code")


def test_a_namespace_is_of_whoever_shares_it(path: Path) -> None:
    """Others' packages in it do not count, nor where on the path it lies."""
    own, other = write(path / "acme_code" / "one" / "__init__.py"), write(path / "acme_code" / "two" / "__init__.py")
    assert package_of("acme_code.one.experts") == "acme_code.one"
    named = "acme_code.one.experts:E"
    before = code("acme_code.one.experts", named=named)
    other.write_text("changed = 1")
    shutil.rmtree(own.parent / "__pycache__", ignore_errors=True)
    assert code("acme_code.one.experts", named=named) == before
    (path / "acme_code").rename(path.parent / "acme_code")
    sys.path.insert(0, str(path.parent))
    sys.path_importer_cache.clear()
    sys.modules.pop("acme_code", None)
    assert code("acme_code.one.experts", named=named) == before


def test_a_class_that_a_call_makes_has_its_functions_code() -> None:
    made = type("Made", (TorchExperts,), {"apply": test_an_edit_shows})
    assert made.__module__ == ABC.__module__
    assert modules_of(made) == ["fp8moe.backends.torch_experts", "fp8moe.experts", __name__]


def test_of_a_registered_one_its_entry_points_module_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may make the class, or choose it."""
    points = [EntryPoint("ACME", f"{name}:SPEC", "fp8moe.backends") for name in ("acme_code", "stranger")]
    for point, distribution in zip(points, ("acme-moe", "stranger"), strict=True):
        vars(point)["dist"] = SimpleNamespace(name=distribution)
    monkeypatch.setattr(backend_code, "entry_points", lambda group: points)
    write(path / "acme_code.py")
    found = code("fp8moe.backends.torch_experts", named="ACME")
    assert (found.told["package"], list(found.files)) == ("acme_code", ["acme_code/acme_code.py"])


def test_what_is_in_no_file_is_told_as_such(path: Path) -> None:
    assert code("no_such_module", named="X") == Code()
    assert code(named="X") == Code()
    assert Code().changed() == ""
    assert difference({}, {"sha256": "0"}) == UNTOLD
    assert difference({"sha256": "0"}, {}) == UNKNOWN
