"""Where tasks are placed on a cluster, and what is said where there is none; no cluster is started."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.editions import edition
from conformance.kept_text import content_of
from conformance.on_ray import ClusterError, Placement, placement_on
from conformance.shards import Shard
from fp8moe.cli import app
from fp8moe.commands.certify import piece_of
from tests.unit.certificates import invented

HEAD = {"CPU": 8.0, "memory": 1e9}
H200 = {"CPU": 64.0, "GPU": 4.0, "accelerator_type:H200": 1.0}
H100 = {"CPU": 64.0, "GPU": 2.0, "accelerator_type:H100": 1.0}


def refused(*arguments: object) -> str:
    found = CliRunner().invoke(app, ["certify", "TorchExperts", *map(str, arguments)])
    assert found.exit_code == 64, found.output
    return found.output


def test_a_gpu_each_of_one_type() -> None:
    of_h200 = {"num_gpus": 1, "accelerator_type": "H200"}
    assert placement_on([HEAD, H200, H200], None, None) == Placement(of_h200, 8, "GPUs of type H200")
    assert placement_on([H100, H200], "cuda", "H200") == Placement(of_h200, 4, "GPUs of type H200")
    assert placement_on([{"GPU": 2.0}], "rocm", None) == Placement({"num_gpus": 1}, 2, "GPUs")


def test_a_core_each() -> None:
    assert placement_on([HEAD, H200], "cpu", None) == Placement({"num_cpus": 1}, 72, "CPU cores")


@pytest.mark.parametrize(
    ("nodes", "device", "accelerator", "told"),
    [
        ([H100, H200], None, None, "2 of type H100, 4 of type H200: a certificate is of one device"),
        ([H100, {"GPU": 1.0}], None, None, "1 of type unknown, 2 of type H100"),
        ([H100], None, "H200", "accelerator H200: the cluster's GPUs are 2 of type H100"),
        ([HEAD], None, None, "no node of the cluster has a GPU: --device cpu"),
        ([], "cuda", None, "no node of the cluster has a GPU"),
        ([H100], "cpu", "H100", "not with --device cpu"),
        ([{"CPU": 0.0}, {}], "cpu", None, "no node of the cluster has a CPU core"),
    ],
)
def test_no_such_place(nodes: list[dict[str, float]], device: str | None, accelerator: str | None, told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        placement_on(nodes, device, accelerator)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = refused("--out", tmp_path / "x", "--device", "cpu", "--ray", "auto")
    assert "Ray is not installed" in told
    assert "pip install 'fp8moe[ray]'" in told


@pytest.mark.parametrize("by_variable", [False, True])
def test_nothing_answers(by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
        if by_variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        told = refused("--out", tmp_path / "x", "--device", "cpu", "--ray", "auto" if by_variable else address)
    assert f"--ray: {address}: nothing answers there" in told
    assert "ray start --head" in told


def test_no_address(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    assert "--ray: nonsense: Invalid address" in refused(
        "--out", tmp_path / "x", "--device", "cpu", "--ray", "nonsense"
    )


@pytest.mark.parametrize(
    ("changed", "options", "told"),
    [
        ({}, ("--ray-shards", "3"), "--ray-shards 3: beside the folder are shards of 4"),
        ({"level": "smoke"}, (), "level='smoke': expected 'certify'"),
        ({"origin": "TRITON"}, (), "origin='TRITON': expected 'TorchExperts'"),
        ({"shard": "2/4"}, (), "shard='2/4': expected '1/4'"),
    ],
)
def test_shards_beside_the_folder(changed: dict[str, str], options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    asked = edition("2026.1")
    own = {"origin": "TorchExperts", "level": asked.level, "seed": asked.seed, "shard": "1/4"}
    report = replace(invented(), **(own | changed))
    piece = piece_of(tmp_path / "x", Shard(1, 4))
    piece.write_bytes(content_of(piece, report.to_json()))
    assert told in refused("--out", tmp_path / "x", "--device", "cpu", "--ray", "auto", *options)


@pytest.mark.parametrize("name", ["x.shard-1-of-4.json.gz", "x.shard-5-of-4.json.gz"])
def test_what_is_no_shard_beside_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{")
    told = refused("--out", tmp_path / "x", "--device", "cpu", "--ray", "auto")
    assert f"{name}: " in told
    assert "move it away" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--ray", "auto", "--shard", "1/2"), "--ray: without --shard"),
        (("--ray", "auto", "--shards", "x.json"), "--ray: without --shard"),
        (("--ray", "auto", "--budget", "3"), "--ray: without --shard"),
        (("--ray-shards", "3"), "with --ray ADDRESS alone"),
        (("--ray-accelerator", "H100"), "with --ray ADDRESS alone"),
        (("--ray", "auto", "--edition", "1999"), "--edition"),
        (("--ray", "auto", "--device", "interpreter"), "--device interpreter"),
        (("--ray", "auto", "--waivers", "nowhere.toml"), "--waivers nowhere.toml"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    assert told in refused("--out", tmp_path / "x", *options)
