"""`fp8moe waivers`: what it lists, and the status that it ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)
from tests.unit.waiver_files import in_days, in_folder


def test_waivers_are_listed_with_the_days_left(tmp_path: Path) -> None:
    path = in_folder(
        tmp_path, {"backend": "TRITON", "expires": in_days(90)}, {"backend": "MARLIN", "expires": in_days(0)}
    )
    told = run("waivers", str(path)).stdout
    for text in ("TRITON", "MARLIN", ">=1.2,<1.4", "Kernels team", in_days(90), "2 waivers"):
        assert text in told
    assert "MARLIN" not in run("waivers", str(path), "--backend", "triton").stdout


def test_of_one_waiver_and_one_day(tmp_path: Path) -> None:
    told = run("waivers", str(in_folder(tmp_path, {"backend": "TRITON", "expires": in_days(-1)})), status=1).stdout
    assert "\n1 waiver, 1 expired" in told
    assert "expired 1 day ago" in " ".join(told.split())


def test_a_backend_that_is_not_known_here(tmp_path: Path) -> None:
    waivers = [{"backend": name, "expires": in_days(9)} for name in ("TRITTON", "acme_moe.experts:A", "TRITON")]
    path = in_folder(tmp_path, *waivers)
    told = run("waivers", str(path), status=2).stdout
    assert "backend TRITTON is not known here: did you mean TRITON?" in told
    assert "backend acme_moe.experts:A is not known here: correct the name, or install its package" in told
    listed = json.loads(run("waivers", str(path), "--json", status=2).stdout)
    assert [waiver["known_here"] for waiver in listed["waivers"]] == [False, False, True]
    run("waivers", str(path), "--backend", "TRITON")


def test_one_that_has_expired(tmp_path: Path) -> None:
    path = in_folder(tmp_path, {"expires": in_days(-3)}, {"backend": "OTHER", "expires": in_days(9)})
    told = run("waivers", str(path), status=1).stdout
    assert "2 waivers, 1 expired: remove them, or renew them with a reason" in told
    listed = json.loads(run("waivers", str(path), "--json", status=1).stdout)
    assert [waiver["days_left"] for waiver in listed["waivers"]] == [-3, 9]
    assert listed["waivers"][0]["case"] == "scheme=block,k=8"
    run("waivers", str(path), "--backend", "OTHER", status=2)


@pytest.mark.parametrize(
    ("waiver", "arguments", "words"),
    [
        ({"chek": "x"}, ["waivers"], "waivers.toml: waiver 1: unknown key 'chek'; did you mean check?"),
        ({}, ["waivers", "--backend", "ACNE"], "--backend 'ACNE' is not known; did you mean ACME?"),
        (None, ["waivers"], "No such file"),
        ({"expires": in_days(200)}, ["check", "TorchExperts", "--waivers"], "--waivers"),
        ({"expires": in_days(200)}, ["check", "TorchExperts", "--waivers"], "200 days from today, at most 180"),
    ],
)
def test_bad_input(waiver: dict[str, object] | None, arguments: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml" if waiver is None else in_folder(tmp_path, {"expires": in_days(9)} | waiver)
    result = run(*arguments, str(path), status=64)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("fp8moe: ")
    assert words in line
