"""A vendor's package, from its wheel beside ours: found, certified where it is right, convicted where it is not."""

import json
import re
import time
from pathlib import Path

import pytest

from fp8moe.commands.init_vendor import BEGIN, END, Names, package_files
from tests.vendors.environment import CHECKOUT, Environment

pytest.importorskip("hatchling", reason="wheels are built with hatchling, of the extra `test`")
pytest.importorskip("pip", reason="wheels are built and installed by pip")

TOY = Path(__file__).parent / "toy-vendor"
FIRST_VERDICT_S = 120
"""Issue "Vendors certify", "Must reach": from the installed package to the first verdict."""
ADDED = {
    "pyproject.toml": ['TOY_BROKEN = "toy_vendor.broken:ToyBrokenExperts"'],
    "toy_vendor/experts.py": ["from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps"],
}
"""What the toy has beside its filled-in places, in files that `fp8moe init-vendor` wrote."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("toy") / "environment", CHECKOUT, TOY)


def test_both_backends_are_there(environment: Environment, tmp_path: Path) -> None:
    where = environment.run(
        "python -c 'import fp8moe, toy_vendor; print(fp8moe.__file__, toy_vendor.__file__)'", tmp_path
    )
    assert all(path.startswith(str(environment.bin.parent)) for path in where.stdout.split())
    told = json.loads(environment.run("fp8moe platform --json", tmp_path).stdout)
    adapters = {row["backend"]: row["adapter"] for row in told["backends"]}
    assert adapters["TOY"] == adapters["TOY_BROKEN"] == "there, from toy-vendor"


def test_the_right_one_passes_in_time(environment: Environment, tmp_path: Path) -> None:
    start = time.monotonic()
    environment.run("fp8moe check TOY --level smoke --device cpu --report toy.json", tmp_path)
    seconds = time.monotonic() - start
    report = json.loads((tmp_path / "toy.json").read_text())
    assert report["verdicts"] == {"selects": "passed", "computes": "passed", "performs": "not_run"}
    assert seconds <= FIRST_VERDICT_S
    exact = [check for check in report["checks"] if "values=exact_sums" in check.get("case", "")]
    assert {check["judged_by"] for check in exact if check["check"] == "computes.equivalence"} == {"bits"}


def test_the_broken_one_fails_and_its_reproduction_too(environment: Environment, tmp_path: Path) -> None:
    # The budget ends no more than the search for smaller cases, and only on a machine that is very busy.
    found = environment.run("fp8moe check TOY_BROKEN --level smoke --device cpu --budget 20", tmp_path, status=1)
    lines = re.findall(r"^ *reproduce: (.+)$", found.stdout, re.MULTILINE)
    assert lines, found.stdout
    assert re.search(r"^FAILED \d+ relations? too, on cases that a plain call fails on: ", found.stdout, re.MULTILINE)
    again = environment.run(lines[0], tmp_path, status=1)
    assert "\nstatus: failed: " in again.stdout
    environment.run(lines[0].replace("TOY_BROKEN", "TOY"), tmp_path)


def test_its_own_test_passes(environment: Environment, tmp_path: Path) -> None:
    environment.run(f"python -m pytest -q -p no:cacheprovider '{TOY}/tests'", tmp_path)


def test_the_toy_is_what_init_vendor_writes() -> None:
    for path, text in package_files(Names.of("toy-vendor", "TOY")).items():
        if path == "README.md":
            continue
        written, found = outside_places(text), outside_places((TOY / path).read_text(encoding="utf-8"))
        docstring = 0 if not path.endswith("experts.py") else found.index("from __future__ import annotations")
        assert set(found[docstring:]) - set(written) == set(ADDED.get(path, [])), path


def outside_places(text: str) -> list[str]:
    """The lines of a file that are no vendor's to fill in."""
    kept, inside = [], False
    for line in text.splitlines():
        inside = (inside or bool(BEGIN.match(line))) and not END.match(line)
        if not inside:
            kept.append(line)
    return kept
