"""How error/bound is distributed, as an SVG: bars with their counts, the limit, and what lies above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from conformance.gate.shown import svg
from conformance.gate.shown.svg import box, line, text
from fp8moe.counted import counted

LIMIT = 1.0
"""Of error/bound."""
PAD, TOP, TALL, FOOT = 16.0, 74.0, 150.0, 56.0
LEAST = 2.0
"""Height of a bar of one case, however many another has."""
GAP = 14.0
"""Between the limit and the bar of what lies above it."""
DASHED = 'stroke-dasharray="5 3" stroke-width="2"'


def binned(values: Sequence[float], bins: int) -> list[int]:
    """How many values each of so many equal parts up to the limit has, and in the last place how many lie above it or
    are no number."""
    found = Counter(min(int(max(value, 0) * bins), bins - 1) if value <= LIMIT else bins for value in values)
    return [found[place] for place in range(bins + 1)]


def names(bins: int) -> list[str]:
    """Of the parts."""
    return [*(f"{place / bins:g} to {(place + 1) / bins:g}" for place in range(bins)), "above the limit"]


def histogram(name: str, values: Sequence[float], title: str, bins: int = 20, width: float = 1000.0) -> str:
    """
    Args:
        name: of its identifiers on the page.
        values: error/bound of each case; not none at all.
        bins: parts up to the limit.
    """
    found = binned(values, bins)
    most = max(found)
    step = (width - 2 * PAD - GAP) / (bins + 1)
    bottom = TOP + TALL
    limit = PAD + bins * step
    told = "; ".join(f"{where}: {count:,}" for where, count in zip(names(bins), found, strict=True) if count)
    body = [text(PAD, 24, title, "f8-ink f8-title"), line(PAD, bottom, width - PAD, bottom, "f8-muted")]
    for place, count in enumerate(found):
        x = PAD + place * step + (GAP if place == bins else 0)
        if count:
            height = max(TALL * count / most, LEAST)
            body.append(box(x + 1, bottom - height, step - 2, height, "f8-slower" if place == bins else "f8-faster"))
            body.append(text(x + step / 2, bottom - height - 5, f"{count:,}", "f8-ink f8-mono", "middle"))
        if place % max(bins // 10, 1) == 0 and place < bins:
            body.append(text(x, bottom + 18, f"{place / bins:g}", "f8-muted", "start" if place == 0 else "middle"))
    body += [
        line(limit, TOP - 24, limit, bottom + 6, "f8-ink", DASHED),
        text(limit - 6, TOP - 14, "limit: 1", "f8-ink f8-strong", "end"),
        text(limit, bottom + 18, "1", "f8-ink", "middle"),
        text(width - PAD, bottom + 18, "> 1", "f8-ink", "end"),
        text(PAD, bottom + 40, "error/bound; above each bar its number of cases", "f8-muted"),
    ]
    return svg.document(name, (width, bottom + FOOT), title, f"{counted(len(values), 'case')}. {told}.", body)
