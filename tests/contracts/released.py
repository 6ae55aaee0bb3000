"""Released wheels of the kernel libraries: their own source, read and never imported.

A wheel comes from the folder in FP8MOE_WHEELS, or from pip, once, into the user's cache.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

PLATFORM = "manylinux_2_28_x86_64"
"""Whatever this machine is: nothing in a wheel is run."""


@dataclass(frozen=True)
class Release:
    """A pinned release of a library: what its adapter was written from."""

    name: str
    version: str
    sha256: str

    @property
    def path(self) -> Path:
        """The wheel's.

        Raises:
            AssertionError: it cannot be had, or is another file than the one that was pinned.
        """
        return _wheel(self)

    def source(self, path: str) -> str:
        """One of its files.

        Raises:
            AssertionError: it has none of that name: the library was laid out anew.
        """
        with zipfile.ZipFile(self.path) as wheel:
            assert path in wheel.namelist(), f"{self.path.name} has no {path}"
            return wheel.read(path).decode()

    def schemas(self, path: str, names: Sequence[str]) -> dict[str, str]:
        """Of operators, as a compiled file registers them, by name; with single spaces.

        Raises:
            AssertionError: the file has none of that name.
        """
        with zipfile.ZipFile(self.path) as wheel:
            content = wheel.read(path)
        found = {}
        for name in names:
            text = re.search(rb"\x00(" + name.encode() + rb"\([^\x00]*\)\s*->[^\x00]*)\x00", content)
            assert text, f"{path} of {self.name} {self.version} registers no {name}"
            found[name] = re.sub(r"\s+", " ", text[1].decode())
        return found

    def symbols(self, path: str, name: str) -> set[str]:
        """Of the compiled functions of that name, as the compiler writes them, their parameters' types with them.

        Raises:
            AssertionError: the file has none.
        """
        with zipfile.ZipFile(self.path) as wheel:
            content = wheel.read(path)
        found = {text.decode() for text in re.findall(rb"_Z\w*%d%s\w*" % (len(name), name.encode()), content)}
        assert found, f"{path} of {self.name} {self.version} has no {name}"
        return found

    def signature(self, path: str, name: str) -> inspect.Signature:
        """Of a function, or of "Class.method" with its self; defaults are not looked at.

        Raises:
            AssertionError: it is not in that file.
        """
        body: list[ast.stmt] = ast.parse(self.source(path)).body
        for part in name.split("."):
            kinds = (ast.FunctionDef, ast.ClassDef)
            found = [one for one in body if isinstance(one, kinds) and one.name == part]
            assert found, f"{path} of {self.name} {self.version} has no {name}"
            node = found[-1]
            body = node.body
        assert isinstance(node, ast.FunctionDef), f"{name} is no function"
        return _signature(node.args)


AITER = Release("amd-aiter", "0.1.7.post2.dev18", "fe139d74438217c35e87e3b961166bac8db2d381eadccb371da2e63615f05a31")
FLASHINFER = Release("flashinfer-python", "0.6.13", "239e6ddc3cbbaf0bee251861a8c7c69438b1171830d69ddfa133ddea4494850d")
VLLM = Release("vllm", "0.25.1", "16fc7a28df1576eb6f7ca0455026551b8f9adb674c19c66059359ef3e964bd1e")
XPU = Release("vllm-xpu-kernels", "0.1.16.2", "86bfa26abbb605fab485236a386e6de07f76320177c456fa96e55c27502af17a")


class DEFAULT:
    """In place of a default."""


def played(signature: inspect.Signature, answer: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function with a released signature: what it is not given is left out of what `answer` gets."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return answer(dict(signature.bind(*args, **kwargs).arguments))

    return call


def _signature(given: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    assert given.vararg is None
    positional = [*given.posonlyargs, *given.args]
    without = len(positional) - len(given.defaults)
    parameters = [
        kinds(one.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if place < without else DEFAULT)
        for place, one in enumerate(positional)
    ]
    parameters += [
        kinds(one.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else DEFAULT)
        for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg is not None:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


@cache
def _wheel(release: Release) -> Path:
    folder = os.environ.get("FP8MOE_WHEELS")
    place = Path(folder) if folder else platformdirs.user_cache_path("fp8moe") / "wheels"
    pattern = f"{release.name.replace('-', '_')}-{release.version}-*.whl"
    found = sorted(place.glob(pattern)) if place.is_dir() else []
    if not found and not folder:
        place.mkdir(parents=True, exist_ok=True)
        platform = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", f"--platform={PLATFORM}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, f"--dest={place}"]
        done = subprocess.run(
            [*command, f"{release.name}=={release.version}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{release.name} {release.version} cannot be had: {done.stderr.strip()[-500:]}"
        found = sorted(place.glob(pattern))
    assert found, f"no {pattern} in {place}: download it there, or unset FP8MOE_WHEELS"
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    assert digest == release.sha256, f"{found[0]} is another file than the one pinned: sha256 {digest}; remove it"
    return found[0]
