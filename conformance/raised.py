"""What a backend raised: in one line, with its own code's place, and in full."""

from __future__ import annotations

import os
import traceback

from fp8moe.texts import MOST, clipped, said, visible

CALLERS = ("conformance.", "fp8moe.", "importlib.", "contextlib")
"""Beginnings of the modules that lie between a case and a backend's own code."""
BACKENDS = ("conformance.zoo.", "conformance.contain.faults")
"""Those of them that are backends themselves."""
LINES = 60
"""Of a traceback, the last."""


def told(error: BaseException) -> str:
    """An exception in one line, with where the backend's own code raised it, or called what did."""
    where = _own_place(error)
    return said(error) + where


def _own_place(error: BaseException) -> str:
    """The deepest frame of the package that the suite called; of our own backends the deepest of all, and none where
    the suite's call itself was refused."""
    frames = [
        (str(frame.f_globals.get("__name__")), os.path.basename(frame.f_code.co_filename), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    foreign = [frame for frame in frames if not frame[0].startswith(CALLERS) or frame[0].startswith(BACKENDS)]
    if foreign:
        package = foreign[0][0].partition(".")[0]
        frames = [frame for frame in foreign if frame[0].partition(".")[0] == package]
    elif not frames or frames[-1][0].startswith("conformance."):
        return ""
    return f" at {frames[-1][1]}:{frames[-1][2]}"


def traceback_of(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(visible(clipped(line, MOST)) for line in lines[-LINES:])
