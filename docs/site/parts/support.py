"""What is known of each backend, from the kept reports."""

from __future__ import annotations

import re

from conformance.support_matrix import markdown
from parts.score import REPORTS, WITHOUT

LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def support_matrix() -> str:
    """As in the README; of a report its folder's name, since reports are no pages."""
    return LINK.sub(r"`\1`", markdown(REPORTS)) if REPORTS.is_dir() else WITHOUT
