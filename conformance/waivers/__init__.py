"""Waivers: known failures of a backend that its vendor answers for, in a TOML file that cannot rot.

    [[waiver]]
    check = "computes.relation.batch_*"    # a check's id; * stands for any text
    case = "scheme=block,k=8"              # a case's id; or fields that a case has, by the keys of an id; or "*"
    backend = "ACME"                       # its name, or "module:Class"
    backend_version = ">=1.2,<1.4"         # of the distribution that brings it, see `conformance.waivers.release`
    device = "NVIDIA H200*"                # in the driver's words or as --device has it; * stands for any text
    reason = "the tail of a group is added twice"
    tracker = "https://tracker.example/kernels/12"
    owner = "Kernels team"
    expires = 2026-12-24                   # the last day, UTC; at most 180 days from today

A case that fails and is covered is waived. A waiver that has expired, covers nothing, covers more than a twentieth of
what must pass, or covers a case that passes, fails the run until the file is put right.

The 180 days count from the day on which the file is read, not from a date within it: that cannot be written ahead, and
a waiver in an old file is no older than its own last change. So none outlives 180 days without an edit.
"""

from __future__ import annotations

from conformance.waivers.file import parse_waivers, read_waivers
from conformance.waivers.waiver import Waiver, WaiverError, Waivers

__all__ = ["Waiver", "WaiverError", "Waivers", "parse_waivers", "read_waivers"]
