"""`fp8moe gate` as its users run it: a baseline, the same code, one more rounding, a backend that is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

BACKEND = '''
import os
from dataclasses import replace

import torch

from conformance.zoo.ordered import Ordered
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.schemes import BLOCK
from fp8moe.support import Support


class Acme(Ordered):
    """Block scales and silu alone; leaves its sums open."""

    contract = replace(Ordered.contract, arithmetic=None)
    support = Support(
        device=lambda platform, env: os.environ.get("ACME") != "gone",
        needs="an Acme accelerator",
        scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )

    def product(self, a, weight):
        total = super().product(a, weight)
        if os.environ.get("ACME") == "rounds":  # to 15 bits, which is within what an undeclared unit may do
            total = ((total.view(torch.int32) + 256) & -512).view(torch.float32)
        return total
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gate")
    (made / "acme_moe.py").write_text(BACKEND)
    done = gate(made, "--write", "baseline.json", "--backend", "acme_moe:Acme", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return made


def gate(folder: Path, *options: str, acme: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "ACME": acme}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fp8moe", "gate", *options, "--part", "numerics"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_same_code_has_the_same_bits(folder: Path) -> None:
    files = [part for name in ("json", "junit", "markdown") for part in (f"--{name}", f"same.{name}")]
    done = gate(folder, "--baseline", "baseline.json", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acme_moe:Acme block: same bits in " in done.stdout
    assert json.loads((folder / "same.json").read_text())["parts"]["numerics"] == "passed"
    assert ElementTree.parse(folder / "same.junit").getroot().get("failures") == "0"
    assert "acme_moe" in (folder / "same.markdown").read_text()


def test_one_more_rounding_fails_the_gate(folder: Path) -> None:
    done = gate(folder, "--baseline", "baseline.json", acme="rounds")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "acme_moe:Acme block: worse: " in done.stdout
    assert "failed: decisions not_run, numerics failed, speed not_run" in done.stdout


def test_a_backend_that_takes_nothing_any_more_is_no_pass(folder: Path) -> None:
    done = gate(folder, "--baseline", "baseline.json", acme="gone")
    assert done.returncode == 64, done.stdout + done.stderr
    assert "acme_moe:Acme gives no output here: DEVICE" in done.stderr
