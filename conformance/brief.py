"""A reason in few words, for a list: without the name of a statistic, each figure once, and cut between words."""

from __future__ import annotations

import re
import textwrap

from conformance.bounds.judgement import MEANINGS
from conformance.gate.shown.words import clipped

MOST = 160
_NAMES = "|".join(MEANINGS)
_STATISTIC = re.compile(rf"(?P<before>.*?)\b(?:{_NAMES}) = (?P<ratio>[^ ]+) > 1: (?P<meaning>[^:;,]+)", re.DOTALL)


def brief(reason: str, most: int = MOST) -> str:
    """Such as "an element is outside its bound (15.1 times the limit)", with what comes before it in the reason."""
    found = _STATISTIC.match(reason)
    if found is not None:
        times = "" if found["ratio"] == "inf" else f" ({found['ratio']} times the limit)"
        reason = f"{found['before']}{found['meaning']}{times}"
    return clipped(textwrap.shorten(reason, most, placeholder=" …", break_on_hyphens=False), most)
