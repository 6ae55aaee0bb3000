"""What holds for the project as a whole: light imports, a light plug-in, one version, nothing that names a machine."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fp8moe
from tests.conftest import LONGEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "triton"}

# Seconds; issue 2, "Must reach".
IMPORT_BUDGET_S = 0.3
PLUGIN_BUDGET_S = 0.1


def run_python(code: str, *args: str, cwd: Path) -> dict[str, object]:
    """Runs `code` in a new interpreter that sees the same fp8moe as this one; returns its last line, read as JSON."""
    spec = importlib.util.find_spec("fp8moe")
    assert spec is not None
    assert spec.origin is not None
    # Plug-ins that happen to be installed would share imports with ours and so hide what ours costs.
    env = os.environ | {"PYTHONPATH": str(Path(spec.origin).parents[1]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import json, sys, time
start = time.perf_counter()
import fp8moe
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""
    # The best of three: a busy machine adds time and never takes any away.
    runs = [run_python(code, cwd=tmp_path) for _ in range(3)]
    loaded = HEAVY.intersection(runs[0]["modules"])
    assert not loaded, f"import fp8moe loads {sorted(loaded)}"
    best = min(run["seconds"] for run in runs)
    assert best <= IMPORT_BUDGET_S, f"import fp8moe took {best:.3f} s, at most {IMPORT_BUDGET_S} s allowed"


@pytest.mark.parametrize("command", [("check",), ("certify", "--out", "certificate")])
def test_a_mistyped_backend_is_told_before_torch_is_there(command: tuple[str, ...], tmp_path: Path) -> None:
    code = """
import json, sys
from fp8moe import registry
registry.entry_points = lambda group: ()  # whatever is installed here
from fp8moe.cli import main
try:
    main()
except SystemExit as ended:
    print(json.dumps({"status": ended.code, "modules": sorted(sys.modules)}))
"""
    told = run_python(code, command[0], "TRITIN", *command[1:], cwd=tmp_path)
    assert told["status"] == 64
    assert not HEAVY.intersection(told["modules"])


def test_plugin_is_light(tmp_path: Path) -> None:
    # A whole pytest start, in process, header included. Wall time, so that a wait or a child process counts as well.
    code = """
import json, sys, time
import pytest
start = time.perf_counter()
status = pytest.main(["-p", "no:cacheprovider", "-p", sys.argv[1]])
seconds = time.perf_counter() - start
print()
print(json.dumps({"seconds": seconds, "status": int(status), "modules": sorted(sys.modules)}))
"""
    with_plugin, without = [], []
    for _ in range(5):  # in turn, so that a busy spell meets both
        with_plugin.append(run_python(code, "conformance.plugin", cwd=tmp_path))
        without.append(run_python(code, "no:conformance.plugin", cwd=tmp_path))
    statuses = {run["status"] for run in with_plugin + without}
    assert statuses == {pytest.ExitCode.NO_TESTS_COLLECTED}
    assert "conformance.plugin" in with_plugin[0]["modules"]
    assert "conformance.plugin" not in without[0]["modules"]
    loaded = HEAVY.intersection(with_plugin[0]["modules"])
    assert not loaded, f"the plug-in loads {sorted(loaded)}"
    added = min(run["seconds"] for run in with_plugin) - min(run["seconds"] for run in without)
    assert added <= PLUGIN_BUDGET_S, f"the plug-in adds {added:.3f} s, at most {PLUGIN_BUDGET_S} s allowed"


def test_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fp8moe.__version__ == project["version"]


def test_files_that_begin_first_are_there() -> None:
    assert [path for path in LONGEST if not path.is_file()] == []


def forbidden() -> re.Pattern[str]:
    """What no file of the repository may name: folders of one machine, and package registries."""
    # In pieces, since this file is searched as well.
    folders = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/"]
    hosts = [
        "pypi" + ".org",
        "python" + "hosted.org",
        "download." + "pytorch.org",
        "registry." + "npmjs",
        "conda." + "anaconda",
    ]
    options = ["index" + "-url", "find" + "-links", "trusted" + "-host"]
    # A folder counts where a path starts: "frame/work/x" and "../root/" are no machine's.
    return re.compile(rf"(?<![\w.-])(?:{'|'.join(folders)})|{'|'.join(map(re.escape, hosts + options))}")


def test_repository_names_no_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip(f"needs a git checkout: {listing.stderr.strip()}")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert Path(__file__) in files
    pattern = forbidden()
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files
        if path.is_file()  # a tracked file may have been deleted
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_forbidden_pattern_finds_what_it_should() -> None:
    pattern = forbidden()
    for text in ("see /wo" + "rk/x", "'/ro" + "ot/.cache'", "https://py" + "pi.org/simple", "--extra-index" + "-url=x"):
        assert pattern.search(text), text
    for text in ("frame/work/x", "../root/x", "a homework", "the index of the url"):
        assert not pattern.search(text), text
