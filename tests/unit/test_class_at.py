"""A class by "module:Class": a mistyped one is a usage error with what may have been meant, and no verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import check_backend
from conformance.class_at import class_at
from conformance.contain.hosting import shutdown
from conformance.not_here import UnknownBackend
from conformance.plan import load_subject
from conformance.planned import BadRequest
from conformance.results import Status
from conformance.zoo import TORCH
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.commands.check import print_report
from fp8moe.registry import BackendContractError
from tests.unit.command_line import no_variables, python, run  # noqa: F401 (a fixture)

PACKAGE = """
from fp8moe.backends.torch_experts import TorchExperts

class AcmeExperts(TorchExperts):
    pass

class AcmeFastExperts(TorchExperts):
    def __init__(self, *args):
        raise RuntimeError("no kernels for this device")

def helper(): ...
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Its folder is on the import path, also of workers, whose server keeps the path that it was started with."""
    folder = tmp_path / "acme_kernels"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "experts.py").write_text(PACKAGE)
    (folder / "lacking.py").write_text("import acme_library\n")
    (folder / "broken.py").write_text("raise RuntimeError('no driver')\n")
    (folder / "aborts.py").write_text("raise KeyboardInterrupt('no license')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shutdown()
    yield tmp_path
    shutdown()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("acme_kernel.experts:AcmeExperts", "there is no module acme_kernel on the import path; did you mean acme_k"),
        ("acme_kernels.expert:AcmeExperts", "there is no module expert in acme_kernels; did you mean acme_kernels.exp"),
        (
            "acme_kernels.experts.more:A",
            "there is no module acme_kernels.experts.more: acme_kernels.experts is a modul",
        ),
        (
            "acme_kernels.experts:AcmeExpert",
            "acme_kernels.experts has no AcmeExpert; did you mean AcmeExperts or AcmeFastExperts? "
            "there: AcmeExperts, AcmeFastExperts",
        ),
        ("acme_kernels.experts:Nobody", "acme_kernels.experts has no Nobody; there: AcmeExperts, AcmeFastExperts"),
        (
            "acme_kernels.experts:helper",
            "expected a subclass of FusedMoEPermuteExpertsUnpermute, not a function; there: AcmeExperts, ",
        ),
        ("json:JSONDecoder", "which JSONDecoder is not; no class of a backend is there"),
        ("acme_kernels.experts:", "expected module:Class on the import path"),
        (":AcmeExperts", "expected module:Class on the import path"),
        ("../acme:AcmeExperts", "expected module:Class on the import path"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(acme: Path, text: str, told: str) -> None:
    with pytest.raises(UnknownBackend) as raised:
        class_at(text)
    assert raised.value.value == text
    assert told in raised.value.told
    assert str(raised.value).startswith(f"{text}: ")


def test_what_is_there_is_found() -> None:
    assert class_at("fp8moe.backends.torch_experts:TorchExperts") is TorchExperts
    assert class_at("conformance.zoo:TORCH.expert0_scale") is TORCH.expert0_scale


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ": the name is empty; expected a backend's name, or module:Class"),
        (" ", " : the name is empty; expected a backend's name, or module:Class"),
        ("acme_kernels.experts", "acme_kernels.experts: module:Class needs a colon, such as acme_kernels.experts:Cl"),
        ("acme_kernels.Experts", "acme_kernels.Experts: module:Class needs a colon, such as acme_kernels:Experts"),
        ("acme_kernel.Experts", "acme_kernel.Experts: no backend has this name; expected one of AITER, "),
        ("..Experts", "..Experts: no backend has this name; did you mean TorchExperts?"),
        ("TRITN", "TRITN: no backend has this name; did you mean TRITON?"),
    ],
)
def test_a_name_that_nothing_has(acme: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    with pytest.raises(UnknownBackend) as raised:
        load_subject(text)
    assert str(raised.value).startswith(told)
    monkeypatch.setattr("conformance.not_here.plug_ins_installed", lambda: False)  # nobody has to be asked
    monkeypatch.setattr("conformance.certification.Worker", None)
    with pytest.raises(BadRequest) as refused:
        check_backend(text, device="cpu")
    assert (refused.value.argument, refused.value.value) == ("backend", text)
    assert refused.value.told.startswith(told.removeprefix(f"{text}: "))


def test_of_many_classes_some_are_told() -> None:
    with pytest.raises(
        UnknownBackend, match=r"has no expert9_scale; did you mean expert0_scale.*\? there: .* and \d+ "
    ):
        class_at("conformance.zoo:TORCH.expert9_scale")


@pytest.mark.parametrize("module", ["lacking", "broken"])
def test_what_a_module_raises_is_its_own(acme: Path, module: str) -> None:
    with pytest.raises((ModuleNotFoundError, RuntimeError), match=r"acme_library|no driver"):
        class_at(f"acme_kernels.{module}:AcmeExperts")
    with pytest.raises(BackendContractError, match=rf"^acme_kernels\.{module}:AcmeExperts: importing it raised "):
        load_subject(f"acme_kernels.{module}:AcmeExperts")


@pytest.mark.parametrize("command", ["check", "certify"])
def test_a_mistyped_class_is_a_usage_error(acme: Path, command: str) -> None:
    options = ["--out", str(acme / "certificate")] if command == "certify" else ["--level", "smoke"]
    done = run(command, "acme_kernels.experts:AcmeExpert", "--device", "cpu", *options, status=64)
    assert done.stdout == ""
    assert (
        "fp8moe: acme_kernels.experts:AcmeExpert: acme_kernels.experts has no AcmeExpert; did you mean" in done.stderr
    )
    assert [path.name for path in acme.iterdir() if path.name.startswith("certificate")] == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("experts:AcmeFastExperts", "its constructor raised RuntimeError: no kernels for this device"),
        ("broken:AcmeExperts", "loading it, or asking what it takes, raised RuntimeError: no driver"),
        ("lacking:AcmeExperts", "raised ModuleNotFoundError: No module named 'acme_library'"),
        ("aborts:AcmeExperts", "loading it, or asking what it takes, raised KeyboardInterrupt: no license"),
    ],
)
def test_a_class_that_raises_has_failed(acme: Path, name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_backend(f"acme_kernels.{name}", device="cpu", stop_at_first=True)
    assert found.verdict == "failed"
    assert any(told in check.reason for check in found.checks if check.status is Status.FAILED)
    print_report(found)
    assert capsys.readouterr().out.startswith(f"acme_kernels.{name} at level smoke on cpu, ")


def test_a_class_that_is_given_and_is_none_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"backend='json\.decoder:JSONDecoder': expected a subclass of"):
        check_backend(json.JSONDecoder, device="cpu")  # type: ignore[arg-type]
