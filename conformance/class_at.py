"""A backend's class by "module:Class"; where there is none, what may have been meant and which classes are there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys

from conformance.not_here import UnknownBackend
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.near import near

LIKE = 0.75
"""How alike the name of a module must be, of which there are hundreds."""
SHOWN = 8


def class_at(text: str) -> type[FusedMoEPermuteExpertsUnpermute]:
    """The class; whether it keeps the contract, others say.

    Raises:
        UnknownBackend: no such module or class, or one that is no backend's.
        Exception: whatever the module raises when it is imported, which is the backend's own doing.
    """
    module, _, path = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise UnknownBackend(text, "expected module:Class on the import path")
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of a module that is there, and misses another
        raise UnknownBackend(text, _no_module(error.name)) from None
    owner = found
    for part in path.split("."):
        try:
            owner, found = found, getattr(found, part)
        except AttributeError:
            raise UnknownBackend(text, f"{_named(module, found)} has no {part}; {_there(found, part)}") from None
    if not isinstance(found, type):
        raise UnknownBackend(text, f"{_expected()}, not a {type(found).__name__}; {_there(owner, '')}")
    if not issubclass(found, FusedMoEPermuteExpertsUnpermute):
        raise UnknownBackend(text, f"{_expected()}, which {found.__name__} is not; {_there(owner, '')}")
    return found


def _expected() -> str:
    return f"expected a subclass of {FusedMoEPermuteExpertsUnpermute.__name__}"


def _named(module: str, found: object) -> str:
    return module if inspect.ismodule(found) else getattr(found, "__name__", module)


def _no_module(name: str) -> str:
    package, _, leaf = name.rpartition(".")
    parent = sys.modules.get(package)
    if package and not hasattr(parent, "__path__"):
        return f"there is no module {name}: {package} is a module, and no package"
    paths = list(getattr(parent, "__path__", ())) if package else None
    names = [each.name for each in pkgutil.iter_modules(paths)]
    meant = [f"{package}.{each}" if package else each for each in near(leaf, names, cutoff=LIKE)]
    where = f"in {package}" if package else "on the import path"
    return f"there is no module {leaf} {where}" + (f"; did you mean {' or '.join(meant)}?" if meant else "")


def _there(owner: object, given: str) -> str:
    """Which classes of backends a module has, and which of them may have been meant."""
    found = {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, type) and issubclass(value, FusedMoEPermuteExpertsUnpermute)
        if value is not FusedMoEPermuteExpertsUnpermute and not name.startswith("_")
    }
    own = [name for name, value in found.items() if value.__module__ == getattr(owner, "__name__", None)]
    names = own or list(found)
    if not names:
        return "no class of a backend is there"
    meant = near(given, names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"did you mean {' or '.join(meant)}? " * bool(meant) + f"there: {', '.join(names[:SHOWN])}{more}"
