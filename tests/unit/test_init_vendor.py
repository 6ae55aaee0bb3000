"""`fp8moe init-vendor`: what it writes, what it refuses, and that an error leaves nothing behind."""

from __future__ import annotations

import ast
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8moe.cli import EXIT_BAD_INPUT
from fp8moe.commands import init_vendor
from fp8moe.commands.init_vendor import PLACES, TAKEN_BACKENDS, Names, package_files, places_to_fill
from fp8moe.registry import SEED_ORDER
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_LINES_TO_FILL = 40
"""Issue "Vendors certify"."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(*arguments: str) -> str:
    """The one line of an error."""
    told = run("init-vendor", *arguments, status=EXIT_BAD_INPUT).stderr
    assert told.count("\n") == 1, told
    return str(told)


def test_a_package_in_a_folder_of_its_name(folder: Path) -> None:
    told = run("init-vendor", "acme-moe").stdout
    assert everything(folder / "acme-moe") == [
        ".github/workflows/conformance.yml",
        ".gitignore",
        "README.md",
        "acme_moe/__init__.py",
        "acme_moe/experts.py",
        "acme_moe/py.typed",
        "pyproject.toml",
        "tests/test_conformance.py",
    ]
    assert [entry.name for entry in folder.iterdir()] == ["acme-moe"]
    assert "cd acme-moe && pip install -e '.[test]' && fp8moe check ACME_MOE --level smoke" in told


def test_one_class_and_one_entry_point(folder: Path) -> None:
    run("init-vendor", "Fast.Kernels", "--into", "here", "--backend", "FAST")
    project = tomllib.loads((folder / "here/pyproject.toml").read_text())["project"]
    assert project["name"] == "Fast.Kernels"
    assert project["entry-points"] == {"fp8moe.backends": {"FAST": "fast_kernels.experts:FastKernelsExperts"}}
    assert set(project["optional-dependencies"]) == {"test"}
    module = ast.parse((folder / "here/fast_kernels/experts.py").read_text())
    assert [node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)] == ["FastKernelsExperts"]


def test_at_most_forty_lines_to_fill(folder: Path) -> None:
    told = run("init-vendor", "acme-moe").stdout
    places = {
        path: places_to_fill((folder / "acme-moe" / path).read_text()) for path in everything(folder / "acme-moe")
    }
    lines = sum(sum(of_file.values()) for of_file in places.values())
    assert 10 < lines <= MOST_LINES_TO_FILL
    assert f"{lines} lines to fill in" in told
    assert set(places["acme_moe/experts.py"]) == {"support", "contract", "weights", "experts"}
    assert all(set(of_file) == {"project"} for path, of_file in places.items() if path == "pyproject.toml")


def test_nothing_of_the_template_is_left() -> None:
    texts = package_files(Names.of("acme_moe-acme-moe", "X_ACME_MOE"))
    for path, text in texts.items():
        left = text.replace("acme_moe-acme-moe", "").replace("acme_moe_acme_moe", "").replace("X_ACME_MOE", "")
        assert "acme" not in left.replace("AcmeMoeAcmeMoe", "").lower(), path
        assert "0.0.0" not in text
    assert len(texts) == len(PLACES)


def test_it_says_that_it_is_the_reference(folder: Path) -> None:
    told = run("init-vendor", "acme-moe").stdout
    assert "until then it is fp8moe's reference" in told
    assert "it is fp8moe's reference and no kernel of yours" in (folder / "acme-moe/acme_moe/experts.py").read_text()
    assert "the class is fp8moe's reference" in (folder / "acme-moe/README.md").read_text()


@pytest.mark.parametrize("into", [".", "empty"])
def test_an_empty_folder_is_filled_and_stays_the_same_one(
    folder: Path, into: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty").mkdir()
    target = folder / "empty"
    if into == ".":
        monkeypatch.chdir(target)
    before = target.stat().st_ino
    run("init-vendor", "acme-moe", "--into", into)
    assert target.stat().st_ino == before
    assert len(everything(target)) == len(PLACES)
    assert [entry.name for entry in folder.iterdir()] == ["empty"]


@pytest.mark.parametrize("name", ["acme moe", "-acme", "acme-", "", "acme/moe", "åcme", "../acme"])
def test_no_name_of_a_distribution(folder: Path, name: str) -> None:
    assert f"NAME {name!r}: no name of a distribution; expected letters" in refused("--", name)
    assert not everything(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("3moe", "Python cannot import a module '3moe'; expected such as acme-moe"),
        ("lambda", "Python cannot import a module 'lambda'"),
        ("json", "its module 'json' would hide another; expected such as json-moe"),
        ("FP8MoE", "its module 'fp8moe' would hide another"),
        ("conformance", "would hide another"),
    ],
)
def test_no_name_of_a_module(folder: Path, name: str, words: str) -> None:
    told = refused(name)
    assert f"NAME {name!r}: " in told
    assert words in told
    assert not everything(folder)


@pytest.mark.parametrize("backend", ["TRITON", "marlin", "NONE", "TorchExperts"])
def test_a_backend_that_is_there(folder: Path, backend: str) -> None:
    told = refused("acme-moe", "--backend", backend)
    assert f"--backend {backend!r}: fp8moe has this name itself; expected another, such as" in told
    assert not everything(folder)


def test_a_backend_that_is_there_by_the_name_of_the_package() -> None:
    assert "--backend 'DEEPGEMM' (made of NAME): fp8moe has this name itself" in refused("deepgemm")


def test_all_eleven_are_taken() -> None:
    assert {name for name, *_ in SEED_ORDER} < TAKEN_BACKENDS


@pytest.mark.parametrize("backend", ["acme:moe", "acme-moe", "8BIT", "", "ÅCME", "A B"])
def test_no_identifier(folder: Path, backend: str) -> None:
    told = refused("acme-moe", f"--backend={backend}")
    assert f"--backend {backend!r}: no identifier; expected letters, digits and _, such as ACME_MOE" in told
    assert not everything(folder)


def test_a_folder_that_is_not_empty(folder: Path) -> None:
    (folder / "acme-moe").mkdir()
    (folder / "acme-moe/kept").touch()
    assert "--into 'acme-moe': the folder is not empty; give another" in refused("acme-moe")
    assert everything(folder) == ["acme-moe/kept"]


def test_a_file_in_place_of_the_folder_and_a_folder_that_is_missing(folder: Path) -> None:
    (folder / "taken").touch()
    assert "--into 'taken': there is a file of this name" in refused("acme-moe", "--into", "taken")
    assert "is not there; make it first" in refused("acme-moe", "--into", "no/such")
    assert everything(folder) == ["taken"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_half_written_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, there: bool, error: BaseException
) -> None:
    """An error in the middle of it: while files are written, and while they are moved into a folder."""
    if there:
        (folder / "acme-moe").mkdir()
    method = "rename" if there else "write_text"
    plain: Any = getattr(Path, method)

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "pyproject.toml" and "package" in self.parts:
            raise error
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, method, failing)
    texts = package_files(Names.of("acme-moe", None))
    with pytest.raises(type(error)):
        init_vendor._write(texts, folder / "acme-moe")
    assert [entry.name for entry in folder.iterdir()] == (["acme-moe"] if there else [])
    assert not everything(folder)


def test_a_folder_that_cannot_be_written_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(init_vendor, "_write", full)
    assert "--into 'acme-moe': cannot be written (no space left); give a folder that can" in refused("acme-moe")


def test_its_workflow_runs_commands_that_there_are(folder: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, and nothing else here reads YAML")
    run("init-vendor", "acme-moe")
    workflow = yaml.safe_load((folder / "acme-moe/.github/workflows/conformance.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert "head.repo.full_name == github.repository" in job["if"]
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines() if line.startswith("fp8moe ")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        help_of = run(words[1], "--help").stdout
        assert all(word in help_of for word in words if word.startswith("--")), line
