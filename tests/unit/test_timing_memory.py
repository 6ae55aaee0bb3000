"""Memory of two steps, one after the other."""

from __future__ import annotations

import pytest

from conformance.timing.memory import Memory


@pytest.mark.parametrize(
    ("first", "later", "both"),
    [
        (Memory(8, 40), Memory(16, 20), Memory(24, 40)),  # the first step's peak is the higher one
        (Memory(8, 40), Memory(16, 36), Memory(24, 44)),  # the later one's, on top of what the first still holds
        (Memory(0, 40), Memory(16, 36), Memory(16, 40)),
        (Memory(8, 8), Memory(-8, 0), Memory(0, 8)),  # the later one gives it back
        (Memory(0, 0), Memory(16, 36), Memory(16, 36)),
    ],
)
def test_what_is_held_adds_up_and_the_peak_is_the_higher(first: Memory, later: Memory, both: Memory) -> None:
    assert first.then(later) == both


def test_figures_have_their_names() -> None:
    assert Memory(8, 40).figures() == {"held_bytes": 8, "peak_bytes": 40}
