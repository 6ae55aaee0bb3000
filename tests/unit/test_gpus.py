"""One GPU for each worker: which it is left with, and whether it has that one to itself."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from conformance import gpus
from conformance.gpus import take_one

SHOWN = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)


def _shown(here: int, given: dict[str, str], environment: dict[str, str]) -> int:
    """All of them, until the environment is another."""
    return here if environment == given else 1


def taken(monkeypatch: pytest.MonkeyPatch, here: int, workers: int, **given: str) -> tuple[list[dict[str, str]], bool]:
    """The environment of each worker, all of which began in the same one; and whether each is told that it is alone."""
    environments = [dict(given) for _ in range(workers)]
    alone = set()
    for worker, environment in enumerate(environments):
        monkeypatch.setattr(gpus, "count", partial(_shown, here, given, environment))
        alone.add(take_one(worker, workers, environment))
    assert len(alone) == 1
    return environments, alone.pop()


@pytest.mark.parametrize("given", [{}, {SHOWN: ""}, {SHOWN: "5"}, {SHOWN: "-1"}])
@pytest.mark.parametrize(("here", "workers", "alone"), [(0, 1, False), (0, 2, False), (1, 1, True), (1, 2, False)])
def test_with_less_than_two_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, here: int, workers: int, alone: bool, given: dict[str, str]
) -> None:
    assert taken(monkeypatch, here, workers, **given) == ([given] * workers, alone)


@pytest.mark.parametrize(
    ("here", "given", "names"),
    [
        (2, None, ["0", "1"]),
        (2, "", ["0", "1"]),
        (2, "3,1", ["3", "1"]),
        (2, " 3 , 1 ", ["3", "1"]),
        (2, "GPU-8f6d4a2b,GPU-0c1e3b5d", ["GPU-8f6d4a2b", "GPU-0c1e3b5d"]),
        (4, None, ["0", "1", "2", "3"]),
        (4, "7,6,5,4", ["7", "6", "5", "4"]),
    ],
)
def test_each_worker_is_left_another_of_the_shown_ones(
    monkeypatch: pytest.MonkeyPatch, here: int, given: str | None, names: list[str]
) -> None:
    others = {"HOME": "/", **({} if given is None else {SHOWN: given})}
    environments, alone = taken(monkeypatch, here, here, **others)
    assert environments == [{**others, SHOWN: name} for name in names]
    assert alone


@pytest.mark.parametrize(("here", "workers"), [(2, 3), (2, 4), (4, 6)])
def test_more_workers_than_gpus_take_them_in_turn(monkeypatch: pytest.MonkeyPatch, here: int, workers: int) -> None:
    environments, alone = taken(monkeypatch, here, workers)
    assert [one[SHOWN] for one in environments] == [str(worker % here) for worker in range(workers)]
    assert not alone


def test_names_that_the_driver_does_not_reach_are_left_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    environments, alone = taken(monkeypatch, 2, 3, **{SHOWN: "2,6,-1,7"})  # it shows those before the first wrong one
    assert [one[SHOWN] for one in environments] == ["2", "6", "2"]
    assert not alone


def test_fewer_workers_than_gpus_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, 4, 2) == ([{SHOWN: "0"}, {SHOWN: "1"}], True)


@pytest.mark.parametrize(("given", "names"), [(None, ["0", "1"]), ("4,6", ["4", "6"])])
def test_amds_devices_are_shown_by_another_variable(
    monkeypatch: pytest.MonkeyPatch, given: str | None, names: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    environments, alone = taken(monkeypatch, 2, 2, **({} if given is None else {"HIP_VISIBLE_DEVICES": given}))
    assert environments == [{"HIP_VISIBLE_DEVICES": name} for name in names]
    assert alone


def test_it_is_this_process_that_is_left_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHOWN, "3,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ[SHOWN].split(",")))
    assert take_one(1, 2)
    assert os.environ[SHOWN] == "5"
    assert gpus.count() == 1


def test_rocms_workers_stay_within_what_the_user_allowed_by_cudas_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    environments, _ = taken(monkeypatch, 2, 2, CUDA_VISIBLE_DEVICES="2,3")
    assert environments == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}]


def test_a_worker_in_place_of_one_that_crashed_is_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a new number, and there are as many as before: its GPU may be another's."""
    counts = iter([4, 1])
    monkeypatch.setattr(gpus, "count", lambda: next(counts))
    assert not take_one(4, 4, {})


def test_a_driver_that_was_asked_before_may_show_all_of_them_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "count", lambda: 4)
    assert not take_one(0, 4, {})
