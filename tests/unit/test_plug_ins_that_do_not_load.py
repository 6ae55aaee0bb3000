"""An installed package whose backend does not load: it is listed, convicted when it is named, and nobody else is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conformance
from conformance.contain.hosting import shutdown
from conformance.session import Session
from fp8moe.registry import BackendContractError, broken_plug_ins
from tests.unit.command_line import no_variables, python, run  # noqa: F401 (a fixture)
from tests.unit.out_of_tree import forget

TOLD = "entry point 'ACME_MOE' of acme-moe (acme_moe:SPEC): loading it raised ImportError: libacme.so is missing"
LINE = f"plug-in that does not load, left out: {TOLD}"


@pytest.fixture(autouse=True)
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As pip installs it; its folder is on the import path, also of workers and of processes."""
    (tmp_path / "acme_moe.py").write_text("raise ImportError('libacme.so is missing')\n")
    folder = tmp_path / "acme_moe-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-moe\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text("[fp8moe.backends]\nACME_MOE = acme_moe:SPEC\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shutdown()
    forget()
    yield tmp_path
    shutdown()
    monkeypatch.undo()
    forget()


@pytest.mark.filterwarnings("ignore::fp8moe.plug_ins.BrokenPlugInWarning")
@pytest.mark.parametrize(
    "command", [["platform"], ["explain", "--platform", "h100"], ["explain", "--all-platforms"]], ids=" ".join
)
def test_it_is_listed(command: list[str]) -> None:
    assert LINE in run(*command).stdout.splitlines()
    answer = json.loads(run(*command, "--json").stdout)
    (listed,) = (answer[0] if isinstance(answer, list) else answer)["plug_ins_that_do_not_load"]
    assert listed == {"entry_point": "ACME_MOE", "backend": "ACME_MOE", "distribution": "acme-moe", "error": TOLD}


def test_the_suites_header_lists_it_and_the_others_are_judged(acme: Path) -> None:
    suite = Path(conformance.__file__).parent
    asked = [str(suite / "test_selects.py"), "--collect-only", "--fp8moe-device=cpu"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *asked]
    path = os.pathsep.join((str(acme), str(suite.parent)))
    # Without the options of the run that we are part of.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = path
    done = subprocess.run(command, cwd=suite.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert LINE in done.stdout.splitlines()


def test_one_that_hangs_is_named_while_it_is_waited_for(acme: Path) -> None:
    module = "import logging, threading\nseen = threading.Event()\n"
    module += "logging.getLogger('fp8moe.plug_ins').addFilter(lambda record: seen.set() or True)\n"
    (acme / "acme_moe.py").write_text(module + "raise ImportError('late' if seen.wait(60) else 'nobody told')\n")
    code = "import fp8moe.plug_ins as p, fp8moe.registry as r; p.SLOW_SECONDS = 0.01; print(r.broken_plug_ins())"
    done = python(code)
    assert done.stderr == "still importing entry point 'ACME_MOE' of acme-moe (acme_moe:SPEC) after 0.01 s\n"
    assert "raised ImportError: late" in done.stdout


def test_it_convicts_nobody_else() -> None:
    found = conformance.check_backend("TRITON", device="cpu", budget_s=0)
    assert found.verdicts["selects"] == "passed"
    assert "did you mean TRITON?" in run("check", "TRITN", "--device", "cpu", status=64).stderr
    assert "did you mean ACME_MOE?" in run("check", "ACME_MO", "--device", "cpu", status=64).stderr


def test_it_is_convicted_where_it_is_named() -> None:
    found = conformance.check_backend("ACME_MOE", device="cpu")
    assert found.verdict == "failed"
    assert TOLD in found.failures[0].reason


def test_strict_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8MOE_STRICT_PLUG_INS", "1")
    assert run("explain", "--platform", "h100", status=64).stderr == f"fp8moe: {TOLD}\n"
    assert conformance.check_backend("TRITON", device="cpu", budget_s=0).verdicts["selects"] == "passed"
    assert [broken.error for broken in broken_plug_ins()] == [TOLD]
    with pytest.raises(BackendContractError, match=r"libacme\.so"):
        conformance.plan.load_subject("ACME_MOE")


def test_pytests_option_names_it_with_its_reason() -> None:
    options = {"--fp8moe-device": "cpu", "--fp8moe-backend": ["ACME_MOE"]}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    with pytest.raises(ValueError, match=f"^--fp8moe-backend=ACME_MOE: it cannot be used: {re.escape(TOLD)}$"):
        Session.of(config)
