"""`fp8moe platform`: the device, its libraries, and what each backend lacks here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from fp8moe.backends.libraries import LibraryBackend
from fp8moe.commands.tables import (
    FORMAT,
    broken_json,
    console,
    platform_json,
    print_broken,
    table,
    yes_or_no,
)
from fp8moe.detection import Detection
from fp8moe.envs import Env, MalformedVariable
from fp8moe.libraries import KINDS
from fp8moe.platforms import LIBRARIES, Platform
from fp8moe.registry import BackendSpec, OutOfTreeBackend, default_backends, registered_backends


def backend_states(platform: Platform, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each backend: whether its device rule takes `platform`, what it lacks there, and its adapter's state."""
    specs = {spec.name: spec for spec in (*default_backends(), *registered_backends())}
    return [_backend_state(spec, platform, env) for spec in specs.values()]


def _backend_state(spec: BackendSpec, platform: Platform, env: Mapping[str, str]) -> dict[str, Any]:
    cls = spec.experts_cls
    takes: bool | None = None
    lacks = "it has no device rule of its own; ask `fp8moe explain`"
    if cls.support is not None:
        try:
            takes = bool(cls.support.device(platform, Env.of(env)))
            lacks = "" if takes else f"needs {cls.support.needs}"
        except MalformedVariable as error:
            lacks = f"cannot be told: {error}"
    package = getattr(cls, "package", None)
    if takes and package in LIBRARIES and not platform.has(package):
        lacks = f"{package} is missing, which its device rule does not ask for"
    if takes and not lacks and issubclass(cls, LibraryBackend):
        lacks = cls.lacks_here(platform, env)
    adapter = "there"
    if isinstance(spec.backend, OutOfTreeBackend):
        adapter = f"there, from {spec.distribution or cls.__module__}"
    if issubclass(cls, LibraryBackend):
        adapter = f"there, by {cls.written_from}, tried on {cls.tried_on or 'no device'}"
    state: dict[str, Any] = {"backend": spec.name, "takes_device": takes, "lacks": lacks, "adapter": adapter}
    if issubclass(cls, LibraryBackend) and cls.variants:
        state["variants"] = dict(cls.variants)
    return state


def detection_json(detection: Detection, backends: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "device": asdict(detection.device),
        "platform": platform_json(detection.platform),
        "libraries": [{**asdict(probe), "install": probe.install} for probe in detection.libraries],
        "backends": backends,
        "plug_ins_that_do_not_load": broken_json(),
    }


def print_detection(detection: Detection, backends: list[dict[str, Any]]) -> None:
    out = console()
    device, platform = detection.device, detection.platform
    memory = "unknown" if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.1f} GiB"
    facts = {
        "device": f"{device.name} ({platform.architecture}), {memory}"
        + (f", first of {device.count}" if device.count > 1 else ""),
        "driver": device.driver or "unknown",
        "built for": device.runtime or "the CPU only",
        "torch": device.torch or "missing",
        "triton": device.triton or "missing",
    }
    heading = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        heading.add_row(name, Text(value))
    for note in device.notes:
        heading.add_row("note", Text(note, style="yellow"))
    out.print(heading)

    libraries = table("kernel libraries", "library", "", "version", "detail", "install")
    for probe in detection.libraries:
        elsewhere = platform.kind not in KINDS[probe.name]
        libraries.add_row(
            probe.name,
            Text("not for here", style="dim") if elsewhere else yes_or_no(probe.present, "present", "missing"),
            probe.version or "",
            Text(probe.detail),
            "" if probe.present or elsewhere else probe.install,
        )
    out.print(libraries)

    states = table("backends", "backend", "device rule", "lacks here", "adapter")
    for row in backends:
        rule = (
            Text("unknown", style="yellow")
            if row["takes_device"] is None
            else yes_or_no(row["takes_device"], "takes it", "no")
        )
        states.add_row(row["backend"], rule, Text(row["lacks"]), row["adapter"])
    out.print(states)
    print_broken(out)
    for row in backends:
        for what, place in row.get("variants", {}).items():
            out.print(f"{row['backend']} with {what}: fp8moe check {place}", soft_wrap=True)
