"""A machine as detection sees it, played."""

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fp8moe.libraries import Surroundings

NO_DEVICE = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
GIB = 2**30


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def fake_torch(
    cuda: Any = NO_DEVICE, xpu: Any = NO_DEVICE, *, cuda_build: str | None = None, hip_build: str | None = None
) -> SimpleNamespace:
    version = SimpleNamespace(cuda=cuda_build, hip=hip_build)
    return SimpleNamespace(__version__="2.13.0", version=version, cuda=cuda, xpu=xpu)


def device(count: int = 1, **properties: Any) -> SimpleNamespace:
    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: count,
        get_device_properties=lambda index: {0: SimpleNamespace(**properties)}[index],
    )


HOPPER = device(major=9, minor=0, name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB)


def around(
    modules: dict[str, Any] | None = None,
    specs: dict[str, ModuleSpec] | None = None,
    programs: tuple[str, ...] = (),
    versions: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    find_spec: Callable[[str], ModuleSpec | None] | None = None,
) -> Surroundings:
    """A machine with exactly this on it; an exception in place of a module is raised by importing it."""

    def import_module(name: str) -> Any:
        found = (modules or {}).get(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if isinstance(found, BaseException):
            raise found
        return found

    def read_text(path: str) -> str:
        if path not in (files or {}):
            raise FileNotFoundError(path)
        return (files or {})[path]

    def version_of(name: str) -> str:
        if name not in (versions or {}):
            raise PackageNotFoundError(name)
        return (versions or {})[name]

    return Surroundings(
        find_spec=find_spec or (lambda name: (specs or {}).get(name)),
        import_module=import_module,
        which=lambda program: f"/opt/bin/{program}" if program in programs else None,
        version_of=version_of,
        read_text=read_text,
        env=env or {},
    )


def spec(name: str, folder: Path | str = "/site") -> ModuleSpec:
    made = ModuleSpec(name, None, origin=f"{folder}/{name}/__init__.py", is_package=True)
    made.submodule_search_locations = [f"{folder}/{name}"]
    return made
