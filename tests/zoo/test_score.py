"""The suite's score against its zoo at level smoke: whoever is convicted stays convicted.

All attackers, and a third of the mutants of backends, which one by the date; `FP8MOE_ZOO_PART=0/1` takes all of them.
Mutants of the selector are in test_zoo_selection.py.
"""

from __future__ import annotations

import datetime
import os

import pytest

from conformance.zoo import ATTACKER_CLASSES, BACKEND_MUTANTS
from conformance.zoo.known import KNOWN_SURVIVORS
from conformance.zoo.plant import Fault
from conformance.zoo.score import KILLED, NOT_HERE, HonestConvicted, Verdict, rotating, score

PARTS = 3
CONTROLS = ("TorchExperts", "BatchedTorchExperts")


def part() -> tuple[int, int]:
    default = f"{datetime.date.today().toordinal() % PARTS}/{PARTS}"
    which, _, parts = os.environ.get("FP8MOE_ZOO_PART", default).partition("/")
    return int(which), int(parts)


def survivors(verdicts: list[Verdict]) -> dict[str, str]:
    """Those that are not known to survive, with the reason."""
    return {
        verdict.mutant: f"{verdict.outcome}: {verdict.reason}"
        for verdict in verdicts
        if verdict.outcome not in (KILLED, NOT_HERE) and "smoke" not in KNOWN_SURVIVORS.get(verdict.mutant, {})
    }


def test_mutants_of_backends_are_convicted() -> None:
    which, parts = part()
    chosen = list(rotating(BACKEND_MUTANTS, which, parts))
    verdicts = score(chosen, "backend", "smoke", device="cpu", controls=CONTROLS)
    assert len(verdicts) == len(chosen) >= len(BACKEND_MUTANTS) // parts
    assert not survivors(verdicts), f"part {which}/{parts}"


def test_attackers_are_convicted() -> None:
    verdicts = score(ATTACKER_CLASSES, "attacker", "smoke", device="cpu")
    assert not survivors(verdicts)
    assert sum(verdict.outcome == KILLED for verdict in verdicts) >= 8


def test_known_survivors_are_mutants_with_a_reason() -> None:
    names = {fault.name for fault, _ in (*BACKEND_MUTANTS, *ATTACKER_CLASSES)}
    assert KNOWN_SURVIVORS.keys() <= names
    assert all(reason for levels in KNOWN_SURVIVORS.values() for reason in levels.values())
    assert len(KNOWN_SURVIVORS) <= 0.03 * len(BACKEND_MUTANTS)


def test_a_score_beside_a_conviction_of_an_honest_backend_is_void() -> None:
    """A mutant in the place of the control stands for a suite that accuses wrongly."""
    mutants = [(Fault("nothing", "", "nothing", False, lambda base: {}), "TorchExperts")]
    with pytest.raises(HonestConvicted, match="which is honest, was convicted by"):
        score(mutants, "backend", "smoke", device="cpu", controls=("conformance.zoo:TORCH.gate_up_swapped",))
