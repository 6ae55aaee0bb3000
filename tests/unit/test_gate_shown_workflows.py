"""The CI workflows that users copy: they parse, give the gate options that it has, and heed its exit status."""

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from conformance.gate.result import EXIT, Status
from conformance.gate.shown.markdown import MARK

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, and nothing else here reads YAML")
BASH = shutil.which("bash") or pytest.skip(
    "bash is not installed, and runs the workflows' scripts", allow_module_level=True
)

FOLDER = files("conformance.gate") / "workflows"
GITHUB, GITLAB = "github-actions.yml", "gitlab-ci.yml"
OUTPUTS = ("markdown", "junit", "json", "html")
BAD_INPUT = 64
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > arguments
for argument in "$@"; do case $argument in *gate.md|*gate.xml) echo "made" > "$argument" ;; esac; done
exit "$STATUS"
"""


def loaded(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = loaded(name)["jobs"]
    return found


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = jobs(GITHUB)[job]["steps"]
    return found


def gate_script(job: str) -> str:
    (found,) = [step["run"] for step in steps(job) if step.get("name") == "Gate"]
    return str(found)


def gitlab_script(job: str) -> str:
    """As a runner joins the lines of a job, less those that need git."""
    return "\n".join(line for line in loaded(GITLAB)[job]["script"] if not line.startswith("git"))


def options(arguments: list[str]) -> argparse.Namespace:
    """As the command takes them; anything else is an error."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("command", choices=["gate"])
    mode = parser.add_mutually_exclusive_group(required=True)
    for name in ("write", "baseline", "against"):
        mode.add_argument(f"--{name}")
    parser.add_argument("--backend", action="append")
    for name in OUTPUTS:
        parser.add_argument(f"--{name}")
    return parser.parse_args(arguments)


def ran(script: str, folder: Path, status: int, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The script in an empty folder, with a gate that notes its arguments and exits as it is told to."""
    tool = folder / "bin" / "fp8moe"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(FAKE)
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "STATUS": str(status), "GITHUB_STEP_SUMMARY": str(folder / "summary"), **env}
    return subprocess.run(
        [BASH, "-eo", "pipefail", "-c", script], cwd=folder, env=given, capture_output=True, text=True
    )


FAKE_GH = """#!/usr/bin/env bash
echo "$@" >> calls
if [ "$2" = --paginate ]; then printf "$BEFORE"; fi
"""
GITHUB_ENV = {"BACKENDS": "--backend TRITON --backend acme.moe:Acme", "BASELINE": "fp8moe-baseline/baseline.json"}
GITLAB_ENV = {f"FP8MOE_{name}": value for name, value in GITHUB_ENV.items()}
SCRIPTS = {
    "github paired": (gate_script("paired"), GITHUB_ENV, {"against": "fp8moe-base"}),
    "github stored": (gate_script("stored"), GITHUB_ENV, {"baseline": GITHUB_ENV["BASELINE"]}),
    "gitlab paired": (gitlab_script("fp8moe-paired"), GITLAB_ENV, {"against": "fp8moe-base"}),
    "gitlab stored": (gitlab_script("fp8moe-stored"), GITLAB_ENV, {"baseline": GITHUB_ENV["BASELINE"]}),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("status", [*sorted(set(EXIT.values())), BAD_INPUT])
def test_commands_are_the_gates_and_its_status_is_heeded(name: str, status: int, tmp_path: Path) -> None:
    script, env, mode = SCRIPTS[name]
    (tmp_path / "fp8moe-gate").mkdir()
    (tmp_path / "fp8moe-baseline").mkdir()
    (tmp_path / GITHUB_ENV["BASELINE"]).write_text("{}")
    done = ran(script, tmp_path, status, env)
    given = options((tmp_path / "arguments").read_text().splitlines())
    outputs = {
        one: f"fp8moe-gate/gate.{ending}" for one, ending in zip(OUTPUTS, ("md", "xml", "json", "html"), strict=True)
    }
    expected = {"write": None, "baseline": None, "against": None, "command": "gate", **mode, **outputs}
    assert vars(given) == {**expected, "backend": ["TRITON", "acme.moe:Acme"]}
    unsure = status == EXIT[Status.INCONCLUSIVE]
    if name.startswith("github"):
        assert done.returncode == (0 if unsure else status)
        assert ("::warning" in done.stdout) == unsure
        assert (tmp_path / "summary").read_text() == "made\n"
    else:
        assert done.returncode == status
        assert loaded(GITLAB)[".fp8moe-gate"]["allow_failure"] == {"exit_codes": EXIT[Status.INCONCLUSIVE]}


def test_a_baseline_is_written_where_there_is_none_or_it_is_asked_for(tmp_path: Path) -> None:
    (write,) = [step for step in steps("stored") if step.get("name") == "Write the baseline"]
    assert ran(write["run"], tmp_path, 0, GITHUB_ENV).returncode == 0
    given = options((tmp_path / "arguments").read_text().splitlines())
    assert (given.write, given.backend) == (GITHUB_ENV["BASELINE"], ["TRITON", "acme.moe:Acme"])
    assert write["if"] == "inputs.renew || hashFiles(env.BASELINE) == ''"
    assert ran(write["run"], tmp_path, BAD_INPUT, GITHUB_ENV).returncode == BAD_INPUT
    lines = [line for line in loaded(GITLAB)["fp8moe-stored"]["script"] if "--write" in line]
    for exists, renew, writes in ((False, "", True), (True, "", False), (True, "true", True)):
        folder = tmp_path / f"{exists}{renew}"
        (folder / "fp8moe-baseline").mkdir(parents=True)
        if exists:
            (folder / GITHUB_ENV["BASELINE"]).write_text("{}")
        assert ran("\n".join(lines), folder, 0, {**GITLAB_ENV, "FP8MOE_RENEW": renew}).returncode == 0
        assert (folder / "arguments").exists() == writes


def test_backends_of_the_workflows_are_options() -> None:
    for told in (loaded(GITHUB)["env"]["BACKENDS"], loaded(GITLAB)[".fp8moe-gate"]["variables"]["FP8MOE_BACKENDS"]):
        assert options(["gate", "--write", "x", *told.split()]).backend == ["TRITON"]


def test_github_jobs_on_the_gpu_are_one_at_a_time_and_may_not_write() -> None:
    assert loaded(GITHUB)["permissions"] == {"contents": "read"}
    on_gpu = {name: job for name, job in jobs(GITHUB).items() if "self-hosted" in job["runs-on"]}
    assert set(on_gpu) == {"paired", "stored"}
    assert {job["concurrency"]["group"] for job in on_gpu.values()} == {"fp8moe-gpu"}
    for job in on_gpu.values():
        assert job["concurrency"]["cancel-in-progress"] is False
        assert "write" not in job.get("permissions", {}).values()
        assert all(
            step["with"]["persist-credentials"] is False for step in job["steps"] if "checkout" in step.get("uses", "")
        )
    writes = {
        name: job["permissions"] for name, job in jobs(GITHUB).items() if "write" in job.get("permissions", {}).values()
    }
    assert writes == {"comment": {"pull-requests": "write"}}
    # Code of a fork never gets to the machine.
    assert "head.repo.full_name == github.repository" in jobs(GITHUB)["paired"]["if"]
    assert "pull_request_target" not in loaded(GITHUB)[True]  # YAML 1.1 reads the key `on` so


def test_github_actions_are_pinned_by_major_version() -> None:
    used = [step["uses"] for job in jobs(GITHUB).values() for step in job["steps"] if "uses" in step]
    assert len(used) == 8
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", one) for one in used)


def test_github_uploads_everything_and_finds_its_comment() -> None:
    for job in ("paired", "stored"):
        kept = [step["with"] for step in steps(job) if "upload-artifact" in step.get("uses", "")]
        assert kept[0]["path"] == "fp8moe-gate/"
    (comment,) = [step["run"] for step in steps("comment") if "run" in step]
    assert f'startswith("{MARK}")' in comment
    assert "fp8moe-gate/gate.md" in comment


@pytest.mark.parametrize("before", ["", "41\n42\n"])
def test_github_comment_is_replaced_or_made(before: str, tmp_path: Path) -> None:
    (comment,) = [step["run"] for step in steps("comment") if "run" in step]
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "gh"
    tool.write_text(FAKE_GH)
    tool.chmod(0o755)
    env = {"BEFORE": before, "GITHUB_REPOSITORY": "a/b", "PULL": "7"}
    assert ran(comment, tmp_path, 0, env).returncode == 0
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    expected = "--method PATCH repos/a/b/issues/comments/42" if before else "--method POST repos/a/b/issues/7/comments"
    assert last.strip() == f"api --silent {expected} -F body=@fp8moe-gate/gate.md"


def test_gitlab_jobs_share_one_gpu_and_show_their_tests() -> None:
    base = loaded(GITLAB)[".fp8moe-gate"]
    assert base["resource_group"] == "fp8moe-gpu"
    assert base["artifacts"]["reports"]["junit"] == "fp8moe-gate/gate.xml"
    assert base["artifacts"]["when"] == "always"
    rules = {
        name: [rule["if"] for rule in loaded(GITLAB)[name]["rules"]] for name in ("fp8moe-paired", "fp8moe-stored")
    }
    assert any(
        "merge_request_event" in rule and "SOURCE_PROJECT_ID == $CI_PROJECT_ID" in rule
        for rule in rules["fp8moe-paired"]
    )
    assert any('"schedule"' in rule for rule in rules["fp8moe-stored"])
    for name in rules:
        assert loaded(GITLAB)[name]["extends"] == ".fp8moe-gate"


def test_the_options_are_those_of_the_command() -> None:
    import typer

    from fp8moe.cli import app

    commands: Any = typer.main.get_command(app)
    known = {option for parameter in commands.commands["gate"].params for option in parameter.opts}
    assert {"--write", "--baseline", "--against", "--backend", *(f"--{name}" for name in OUTPUTS)} <= known
