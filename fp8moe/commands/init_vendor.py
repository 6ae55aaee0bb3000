"""`fp8moe init-vendor NAME`: a package with a backend in it, written from the files in `fp8moe/vendor_template`."""

from __future__ import annotations

import keyword
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fp8moe import __version__
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted
from fp8moe.registry import Fp8MoeBackend

TEMPLATE = "fp8moe.vendor_template"
PLACES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "workflow.yml": ".github/workflows/conformance.yml",
    "__init__.py": "acme_moe/__init__.py",
    "py.typed": "acme_moe/py.typed",
    "experts.py": "acme_moe/experts.py",
    "check_conformance.py": "tests/test_conformance.py",
}
"""Where each file of the template goes in the package; what is named acme there gets the vendor's names."""
BEGIN, END = re.compile(r"^\s*# fill in: (\w+)$"), re.compile(r"^\s*# end$")
"""The lines around a place that the vendor fills in."""
DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
PLAIN_BACKENDS = ("TorchExperts", "BatchedTorchExperts")
"""What `fp8moe check` knows beside registered names."""
TAKEN_BACKENDS = frozenset(name.upper() for name in (*Fp8MoeBackend.__members__, *PLAIN_BACKENDS))
TAKEN_MODULES = frozenset({"conformance", "fp8moe", "tests", "torch", "triton"}) | sys.stdlib_module_names


@dataclass(frozen=True)
class Names:
    """What one package is called.

    Args:
        distribution: as pip knows it, such as "acme-moe".
        module: as Python imports it, "acme_moe".
        backend: as users of fp8moe write it, "ACME_MOE".
    """

    distribution: str
    module: str
    backend: str

    @classmethod
    def of(cls, name: str, backend: str | None) -> Names:
        """From a distribution's name, and a backend's if it is not to be made of that.

        Raises:
            BadInput: it is no name of a distribution, its module could not be imported or hides another, or the
                backend's name is taken or no identifier.
        """
        if not DISTRIBUTION.fullmatch(name):
            raise BadInput(
                f"NAME {name!r}: no name of a distribution; expected letters and digits, and . _ or - between them"
            )
        module = re.sub(r"[-_.]+", "_", name).lower()
        if not module.isidentifier() or keyword.iskeyword(module):
            raise BadInput(f"NAME {name!r}: Python cannot import a module {module!r}; expected such as acme-moe")
        if module in TAKEN_MODULES:
            raise BadInput(f"NAME {name!r}: its module {module!r} would hide another; expected such as {name}-moe")
        made = backend is None
        backend = module.upper() if backend is None else backend
        field = f"--backend {backend!r}" + (" (made of NAME)" if made else "")
        if not (backend.isascii() and backend.isidentifier()):
            raise BadInput(f"{field}: no identifier; expected letters, digits and _, such as {module.upper()}")
        if backend.upper() in TAKEN_BACKENDS:
            raise BadInput(f"{field}: fp8moe has this name itself; expected another, such as --backend ACME_{backend}")
        return cls(name, module, backend)

    @property
    def words(self) -> Mapping[str, str]:
        """What stands in the template, and what takes its place."""
        prefix = "".join(part.capitalize() for part in self.module.split("_"))
        return {
            "acme-moe": self.distribution,
            "acme_moe": self.module,
            "AcmeMoe": prefix,
            "ACME_MOE": self.backend,
            "fp8moe>=0.0.0": f"fp8moe>={__version__}",
        }


@dataclass(frozen=True)
class Written:
    """A package that was written: its folder, its names, and each of its files with the places to fill in."""

    folder: Path
    names: Names
    places: Mapping[str, Mapping[str, int]]
    """By file, the lines of each place."""

    @property
    def lines(self) -> int:
        return sum(sum(of_file.values()) for of_file in self.places.values())


def package_files(names: Names) -> dict[str, str]:
    """The text of each file, by its path in the package."""
    words = names.words
    pattern = re.compile("|".join(map(re.escape, words)))

    def named(text: str) -> str:
        return pattern.sub(lambda found: words[found[0]], text)

    template = files(TEMPLATE)
    return {named(place): named((template / name).read_text(encoding="utf-8")) for name, place in PLACES.items()}


def places_to_fill(text: str) -> dict[str, int]:
    """How many lines each place of a file has, those that are there from the start included."""
    found: dict[str, int] = {}
    inside = None
    for line in text.splitlines():
        if inside is not None and END.match(line):
            inside = None
        elif inside is not None:
            found[inside] += 1
        elif begin := BEGIN.match(line):
            inside = begin[1]
            found[inside] = 0
    return found


def written(name: str, into: Path | None, backend: str | None) -> Written:
    """Writes a package: all of it, or on an error nothing.

    Args:
        name: of the distribution.
        into: the folder to write, which must not be there yet, or be empty; None: `name`, in the current one.
        backend: its name; None: made of `name`.

    Raises:
        BadInput: a name that cannot be, or a folder that is not empty or cannot be written.
    """
    names = Names.of(name, backend)
    texts = package_files(names)
    folder = (Path(name) if into is None else into).absolute()
    field = f"--into {str(name if into is None else into)!r}"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise BadInput(f"{field}: the folder is not empty; give another, or empty it first")
        if os.path.lexists(folder) and not folder.is_dir():
            raise BadInput(f"{field}: there is a file of this name; give another")
        if not folder.parent.is_dir():
            raise BadInput(f"{field}: {str(folder.parent)!r} is not there; make it first")
        _write(texts, folder)
    except OSError as error:
        raise BadInput(f"{field}: cannot be written ({error}); give a folder that can") from None
    return Written(folder, names, {path: places_to_fill(text) for path, text in texts.items()})


def _write(texts: Mapping[str, str], folder: Path) -> None:
    """Beside the folder first, and then to its place in one step, or, where it is there already, into it."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        package = scratch / "package"  # with the user's own permissions, which a temporary folder has not
        for path, text in texts.items():
            file = package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        if folder.is_dir():
            _move_into(folder, package)
        else:
            package.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_into(folder: Path, package: Path) -> None:
    """The entries of a package into an empty folder, which stays the same one: somebody may stand in it."""
    moved: list[Path] = []
    try:
        for entry in sorted(package.iterdir()):
            entry.rename(folder / entry.name)
            moved.append(folder / entry.name)
    except BaseException:
        for path in moved:
            path.rename(package / path.name)
        raise


def print_written(package: Written) -> None:
    """What there is now, where to fill it in, and what to type next."""
    print(f"{package.names.distribution}: the backend {package.names.backend}, in {package.folder}")
    for path, places in package.places.items():
        told = ", ".join(places)
        print(f"  {path}" + (f"    fill in: {told}" if told else ""))
    here = shlex.quote(os.path.relpath(package.folder))
    print(f"{counted(package.lines, 'line')} to fill in; until then it is fp8moe's reference. A first verdict:")
    go = "" if here == "." else f"cd {here} && "
    print(f"  {go}pip install -e '.[test]' && fp8moe check {package.names.backend} --level smoke")
