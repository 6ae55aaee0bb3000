"""Which backend is selected for the published models: here, and on a few devices of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.models import MODELS
from conformance.plan import Target
from fp8moe.platforms import PLATFORMS
from fp8moe.schemes import SCHEMES
from fp8moe.selector import explain_fp8_moe_backend

SHOWN_DEVICES = ("h100", "b200", "mi300x")


@dataclass(frozen=True)
class SelectedRow:
    """One model on one scheme: the backend on each device, in the order of the devices."""

    model: str
    scheme: str
    selected: tuple[str, ...]


def selected_rows(target: Target) -> tuple[list[str], list[SelectedRow]]:
    """The names of the devices, and a row for each published model; no variable set, CUTLASS allowed as its
    checkpoint's caller does (specification section 1.8)."""
    platforms = {"here": target.platform, **{name: PLATFORMS[name] for name in SHOWN_DEVICES}}
    rows = []
    for model in MODELS.values():
        for scheme in model.schemes:
            weight_key, activation_key = SCHEMES[scheme]
            texts = []
            for platform in platforms.values():
                selection = explain_fp8_moe_backend(
                    model.config(model.default_split),
                    weight_key,
                    activation_key,
                    scheme == "channel_tok",
                    platform=platform,
                    env={},
                )
                chosen = "none fits" if selection.backend is None else selection.backend.name
                texts.append(chosen)
            rows.append(SelectedRow(model.name, scheme, tuple(texts)))
    return list(platforms), rows
