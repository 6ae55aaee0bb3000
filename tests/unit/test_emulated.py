"""Emulated devices: distances between outputs, what is declared and what assumed, the bounds' power, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from conformance import emulated
from conformance.bounds import allowance_for, judge
from conformance.cases import Case, InvalidCase
from conformance.emulated import DEVICES, Distance, Emulation, check_device, distance, emulate, looser_bounds
from conformance.results import CheckResult, Evidence, Status
from fp8moe import cli
from fp8moe.backends.triton_arithmetic import LARGE_TILE, SMALL_TILE, arithmetic_by_tile
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Arithmetic

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Case(tokens=3, experts=4, top_k=2, hidden=144, inter=136, values="same_sign")
LARGE = Case(tokens=17, experts=1, top_k=1, hidden=144, inter=72, values="same_sign")


@pytest.fixture(scope="module")
def small() -> Emulation:
    return emulate(SMALL)


@pytest.fixture(scope="module")
def large() -> Emulation:
    return emulate(LARGE)


# -- distances --


def test_distance_by_hand() -> None:
    """1 and 1 + 2^-7 are neighbours in bf16, 2 and 2.5 are 32 numbers apart."""
    first = torch.tensor([[1.0, 4.0, 0.0], [2.0, -1.0, 0.0]], dtype=torch.bfloat16)
    second = torch.tensor([[1.0078125, 4.0, -0.0], [2.5, -1.0, 0.0]], dtype=torch.bfloat16)
    found = distance(first, second, torch.full((2, 3), 2.0), first_gemm=0.5)
    assert found == Distance(2, 6, 32, 0.5 / 2.5, 0.25, 0.5)
    assert found.share == 1 / 3
    assert distance(second, first, torch.full((2, 3), 2.0), first_gemm=0.5) == found


@pytest.mark.parametrize("wild", [torch.inf, torch.nan])
def test_what_is_not_finite_is_infinitely_far_and_survives_json(wild: float) -> None:
    first = torch.tensor([[1.0, wild]], dtype=torch.bfloat16)
    second = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert distance(first, first, torch.ones(1, 2)) == Distance(0, 2, 0, 0.0, 0.0, 0.0)
    found = distance(first, second, torch.ones(1, 2))
    assert (found.differing, found.of_token, found.of_bound) == (1, torch.inf, torch.inf)
    assert Distance.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_no_elements_are_at_no_distance() -> None:
    nothing = torch.empty(0, 4, dtype=torch.bfloat16)
    assert distance(nothing, nothing, torch.empty(0, 4)).share == 0.0
    results = [check_device(emulate(replace(SMALL, tokens=0), [name]), name) for name in DEVICES]
    assert {result.status for result in results} == {Status.PASSED}


def test_equal_arithmetic_gives_equal_bits(small: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = replace(DEVICES["sm_89"], name="twin")
    monkeypatch.setitem(DEVICES, "twin", twin)
    found = emulate(SMALL, ["sm_89", "twin", "sm_90"]).distances
    assert (found["sm_89", "twin"].differing, found["sm_89", "twin"].first_gemm) == (0, 0.0)
    assert found["sm_89", "sm_90"] == found["twin", "sm_90"] == small.distances["sm_89", "sm_90"]
    assert found["sm_89", "sm_90"].differing > 0


def test_order_of_the_devices_does_not_count(small: Emulation) -> None:
    turned = emulate(SMALL, list(reversed(DEVICES))).distances
    assert {frozenset(pair): found for pair, found in turned.items()} == {
        frozenset(pair): found for pair, found in small.distances.items()
    }


# -- the devices --


def test_devices_have_what_our_backend_declares() -> None:
    declared = {name: device for name, device in DEVICES.items() if device.basis.startswith("declared")}
    assert set(declared) == {"sm_89", "sm_90", "sm_100", "sm_120"}
    for device in declared.values():
        assert device.by_tile == arithmetic_by_tile(PLATFORMS[device.stands_for], interpreted=False)
    for device in DEVICES.values():
        assert set(device.by_tile) == {SMALL_TILE, LARGE_TILE}


def test_what_is_assumed_is_what_nobody_declares() -> None:
    assert DEVICES["gfx942"].basis.startswith("assumed")
    assert arithmetic_by_tile(PLATFORMS[DEVICES["gfx942"].stands_for], interpreted=False) is None


def test_the_size_of_a_case_chooses_the_tile(small: Emulation, large: Emulation) -> None:
    assert (small.tile, large.tile) == (SMALL_TILE, LARGE_TILE)
    assert small.arithmetic("sm_90").unit == "hopper.mma_f16"
    assert large.arithmetic("sm_90").unit == "hopper.wgmma"


# -- the bounds --


def test_every_output_holds_its_bound(small: Emulation, large: Emulation) -> None:
    for emulation in (small, large):
        assert looser_bounds(emulation) == []
        for name in DEVICES:
            result = check_device(emulation, name)
            assert (result.status, result.evidence) == (Status.PASSED, Evidence.SIMULATED), result.reason
            assert CheckResult.from_json(result.to_json()) == result
        assert all(found.of_bound <= 1 for found in emulation.distances.values())


def test_a_better_unit_is_held_to_less(large: Emulation) -> None:
    def allowed(name: str) -> float:
        return float(allowance_for(large.trace, large.arithmetic(name)).smooth.sum())

    for coarse in ("sm_89", "sm_90"):
        for fine in ("sm_100", "sm_120", "gfx942"):
            assert allowed("fp32") < allowed(fine) < allowed(coarse) / 100


def test_outputs_of_zeros_break_no_order() -> None:
    assert looser_bounds(emulate(Case.parse("v1:E=4,H=128,I=128,M=1,values=zero_blocks,seed=719"))) == []


@pytest.mark.parametrize("name", ["sm_89", "sm_90"])
@pytest.mark.parametrize("better", ["sm_100", "sm_120", "gfx942", "fp32"])
def test_a_unit_of_13_bits_does_not_pass_for_a_better_one(large: Emulation, name: str, better: str) -> None:
    assert not judge(large.trace, large.replays[name].output, large.arithmetic(better)).passed
    claimed = Emulation(LARGE, LARGE_TILE, large.trace, {better: large.replays[name]})
    result = check_device(claimed, better)
    assert result.status is Status.FAILED
    assert "E1" in result.reason
    assert "first_gemm" in result.reason
    assert str(LARGE) in result.reproduce


def test_bounds_the_wrong_way_round_are_told(large: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that keeps 13 bits, promoted as often as it can be, beside one that is taken to keep 14 and is not."""
    often = Arithmetic("unknown", fraction_bits=13, group=16, promote_every=16)
    seldom = Arithmetic("unknown", fraction_bits=14, group=16)
    for name, arithmetic in (("sm_89", often), ("sm_90", seldom)):
        device = replace(DEVICES[name], by_tile=dict.fromkeys((SMALL_TILE, LARGE_TILE), arithmetic))
        monkeypatch.setitem(DEVICES, name, device)
    two = Emulation(LARGE, LARGE_TILE, large.trace, {name: large.replays[name] for name in ("sm_89", "sm_90")})
    told = looser_bounds(two)
    assert len(told) == 1
    assert "is allowed more" in told[0]
    assert told[0].startswith("sm_90 keeps more bits than sm_89")


# -- the report --


def test_summary_has_both_tile_heights(small: Emulation, large: Emulation) -> None:
    results = [check_device(emulation, name) for emulation in (small, large) for name in DEVICES]
    made = emulated.summary_table(results)
    assert made is not None
    cells = [list(column.cells) for column in made.columns]
    names = list(DEVICES)
    assert cells[0] == names
    for row, one in enumerate(names):
        for column, other in enumerate(names):
            emulation = large if row < column else small
            found = emulation.distances.get((one, other)) or emulation.distances.get((other, one))
            text = cells[column + 1][row]
            assert (text == "") == (one == other)
            assert found is None or text.startswith(f"{found.share:.1%}" if found.differing else "equal")
    assert emulated.summary_lines(results)[0].startswith(f"emulated: {len(results)} of {len(results)} outputs")


def test_summary_of_nothing_and_of_what_was_not_run() -> None:
    assert emulated.summary_table([]) is None
    assert emulated.summary_lines([]) == []
    not_run = CheckResult("computes", emulated.CHECK, Status.NOT_RUN, reason="no time")
    assert emulated.summary_lines([not_run]) == ["not run: emulated: no time"]


# -- the command --


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["emulate", *arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def test_command_prints_the_table_and_what_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    text = run(str(SMALL))
    for expected in (str(SMALL), "tiles of 16 rows", *DEVICES, "assumed, neither declared nor measured", "simulated"):
        assert expected in text
    only = run(str(SMALL), "--device", "mi300x", "--device", "sm-89")
    assert "cdna3.mfma_f16" in only
    assert "sm_100" not in only


def test_command_prints_json(small: Emulation) -> None:
    told = json.loads(run("--json", str(SMALL)))
    assert Case.parse(told["case"]) == SMALL
    assert (told["tile"], told["evidence"]) == (SMALL_TILE, "simulated")
    assert [device["device"] for device in told["devices"]] == list(DEVICES)
    assert {device["status"] for device in told["devices"]} == {"passed"}
    for device in told["devices"]:
        assert Arithmetic(**device["arithmetic"]) == small.arithmetic(device["device"])
    assert {tuple(row["devices"]): Distance.from_json(row) for row in told["distances"]} == small.distances


def test_command_ends_with_1_where_a_bound_is_broken(large: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    liar = replace(DEVICES["sm_90"], by_tile=DEVICES["sm_100"].by_tile)
    monkeypatch.setitem(DEVICES, "sm_90", liar)
    claimed = Emulation(LARGE, LARGE_TILE, large.trace, {"sm_90": large.replays["sm_90"]})
    monkeypatch.setattr("fp8moe.commands.emulate.emulate", lambda case, devices: claimed)
    assert "FAILED TRITON on sm_90: E1 = " in run(str(LARGE), status=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["v1:M=x"], "tokens"),
        (["v2:M=3"], "v1"),
        (["v1:M=3,scheme=none"], "expected one of block"),
        (["v1:M=3,fnuz=on"], "e4m3fn"),
        (["v1:M=3", "--device", "sm_70"], "sm_90"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], expected: str) -> None:
    text = run(*arguments, status=cli.EXIT_BAD_INPUT)
    assert expected in text
    assert text.startswith("fp8moe: ")
    assert text.count("\n") == 1


def test_unknown_devices_and_schemes_are_told() -> None:
    with pytest.raises(ValueError, match="expected one of sm_89"):
        emulate(SMALL, ["sm_70"])
    with pytest.raises(InvalidCase, match="scheme"):
        emulate(replace(SMALL, scheme="none"))
