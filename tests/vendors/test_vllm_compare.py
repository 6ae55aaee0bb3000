"""Our adapters beside vLLM's classes, without either: the table, the order of the cells, what ends a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8moe_vllm import cells, compare, told

from conformance.build import build
from fp8moe import BackendUnavailable
from fp8moe.experts import contract_violations
from tests.contracts.layers import case


def compared(ratio: float, width: float = 0.005, **fields: Any) -> told.Compared:
    plain = told.Compared(
        "qwen3-30b",
        "Qwen3-30B-A3B",
        "block",
        16,
        "TRITON",
        "TritonCaller",
        100 * ratio,
        100.0,
        ratio,
        0,
        0,
        64,
        2,
        1e-3,
    )
    return replace(plain, low=ratio - width, high=ratio + width, **fields)


def test_the_table_and_what_is_above() -> None:
    rows = [
        compared(1.029, tokens=4096),
        compared(0.90, ours="MARLIN"),
        compared(1.05, tokens=1),
        compared(1.034, tokens=64),
        compared(1.20, shape="mixtral-tp2", ours="VLLM_CUTLASS"),
    ]
    lines = told.table(rows).splitlines()
    assert lines[0] == told.HEAD
    assert [line.split()[:3] for line in lines[1:]] == [
        ["qwen3-30b", "16", "MARLIN"],
        ["qwen3-30b", "1", "TRITON"],
        ["qwen3-30b", "64", "TRITON"],
        ["qwen3-30b", "4096", "TRITON"],
        ["mixtral-tp2", "16", "VLLM_CUTLASS"],
    ]
    assert lines[1].split()[3:] == ["90.0", "100.0", "0.900", "0.895", "to", "0.905"]
    assert lines[2].endswith("1.045 to 1.055 ABOVE")
    assert lines[3].endswith("1.029 to 1.039 above")
    assert lines[4].endswith("1.024 to 1.034")
    text = told.verdict(rows, {"a M=1 X": "no time was left", "b M=1 X": "no time was left", "c": "no vllm"})
    assert text.splitlines() == [
        "worst: 1.200 (1.195 to 1.205), mixtral-tp2 M=16 VLLM_CUTLASS",
        "above 1.03: 3 of 5, 2 of them with their whole interval:",
        "  1.200 mixtral-tp2 M=16 VLLM_CUTLASS",
        "  1.050 qwen3-30b M=1 TRITON",
        "  1.034 qwen3-30b M=64 TRITON",
        "not timed: no time was left: 2: a M=1 X, b M=1 X",
        "not timed: no vllm: 1: c",
    ]
    assert told.verdict(rows[:2], {}).splitlines()[1] == "above 1.03: none of 2"
    assert told.verdict([], {}) == "nothing was timed"


def test_the_most_telling_cells_come_first() -> None:
    found = cells.cells(cells.SHAPES, cells.TOKENS, tuple(cells.RIVALS))
    assert len(found) == len(set(found)) == (4 + 2) * 7 * 3
    own = [one for one in found if not one.handed_on]
    assert found[: len(own)] == own
    tokens = list(dict.fromkeys(one.tokens for one in own))
    assert tokens == [16, 256, 4096, 1, 64, 1024, 16384]
    of_deepgemm = {(one.shape.name, one.tokens) for one in own if one.ours == "DEEPGEMM"}
    assert of_deepgemm == {(s, m) for s in ("dsv3-32", "qwen3-30b") for m in (256, 1024, 4096, 16384)}
    assert {one.theirs for one in found if one.handed_on} == {cells.HANDED_ON}
    assert all(one.ours != "DEEPGEMM" or one.shape.scheme == "block" for one in found)


def test_every_rival_is_there() -> None:
    from fp8moe_vllm import callers

    for name in (*cells.RIVALS.values(), cells.HANDED_ON):
        assert contract_violations(getattr(callers, name)) == []
    assert f"{cells.CALLERS}:{cells.HANDED_ON}".startswith(callers.__name__)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that sees nothing, and a device that is always there."""

    class Blind:
        def __enter__(self) -> Blind:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def told(self) -> dict[str, str]:
            return {"device state": "not watched: played"}

    monkeypatch.setattr(compare, "Watch", Blind)
    monkeypatch.setattr(compare, "_alive", lambda: True)
    monkeypatch.setattr(compare.Held, "of", classmethod(lambda cls, shape, tokens: cls([], {})))


@pytest.mark.usefixtures("no_device")
def test_a_cell_that_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(cell: cells.Cell, held: Any, watch: Any) -> told.Compared:
        if cell.ours == "MARLIN":
            raise BackendUnavailable("MARLIN: no operators")
        if cell.tokens == 256:
            raise RuntimeError("out of luck\nmore")
        return compared(1.0, shape=cell.shape.name, tokens=cell.tokens, ours=cell.ours)

    monkeypatch.setattr(compare, "compare", played)
    kept: list[int] = []
    asked = cells.cells(cells.SHAPES[2:3], (16, 256), ("MARLIN", "TRITON"))
    result = compare.run(asked, 100.0, lambda so_far: kept.append(len(so_far.compared)), {"command": "x"})
    assert [one.name for one in result.compared] == ["qwen3-30b M=16 TRITON"]
    assert result.left == {
        "qwen3-30b M=16 MARLIN": "MARLIN: no operators",
        "qwen3-30b M=256 MARLIN": "MARLIN: no operators",
        "qwen3-30b M=256 TRITON": "RuntimeError: out of luck",
    }
    assert kept == [0, 1, 1, 1, 1]
    written = json.loads(json.dumps(result.to_json()))
    assert written["about"] == {"command": "x", "watch": {"device state": "not watched: played"}}
    assert written["above"] == []
    assert written["worst"] == "qwen3-30b M=16 TRITON"


@pytest.mark.usefixtures("no_device")
def test_it_stops_in_time_and_says_what_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def played(cell: cells.Cell, held: Any, watch: Any) -> told.Compared:
        clock.now += 20.0
        return compared(1.0, shape=cell.shape.name, tokens=cell.tokens, ours=cell.ours)

    monkeypatch.setattr(compare, "compare", played)
    asked = cells.cells(cells.SHAPES[2:3], (1, 16, 256), ("TRITON",))
    result = compare.run(asked, 45.0, lambda so_far: None, {})
    assert [one.tokens for one in result.compared] == [16, 256]
    assert result.left == {"qwen3-30b M=1 TRITON": "no time was left"}
    assert clock.now == 40.0


@pytest.mark.usefixtures("no_device")
def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(cell: cells.Cell, held: Any, watch: Any) -> told.Compared:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(compare, "compare", played)
    monkeypatch.setattr(compare, "_alive", lambda: False)
    asked = cells.cells(cells.SHAPES[2:3], (16, 256), ("TRITON",))
    result = compare.run(asked, 100.0, lambda so_far: None, {})
    assert result.left["qwen3-30b M=256 TRITON"] == "the device was lost at qwen3-30b M=16 TRITON"


def test_inputs_rotate_and_layers_share_nothing() -> None:
    tensors = build(case("block", tokens=9), "cpu")
    held = compare.Held([tensors, compare._copied(tensors)], {})
    first, second = held.calls(4)
    assert first.case.tokens == second.case.tokens == len(first.hidden_states) == 4
    assert torch.equal(first.hidden_states, tensors.hidden_states[:4])
    assert torch.equal(second.hidden_states, tensors.hidden_states[:4].roll(1, 0))
    assert torch.equal(second.topk_ids, tensors.topk_ids[:4].roll(1, 0))
    assert second.weights.w13.data_ptr() != first.weights.w13.data_ptr()
    assert torch.equal(second.weights.w13.view(torch.uint8), first.weights.w13.view(torch.uint8))


def test_a_backend_that_cannot_be_made_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def subject(name: str) -> Any:
        asked.append(name)
        raise BackendUnavailable("no library")

    monkeypatch.setattr(compare, "load_subject", subject)
    held = compare.Held([], {})
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="no library"):
            held.backends("MARLIN")
    assert asked == ["MARLIN"]


def test_options_that_name_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nobody: expected some of dsv3-tp8"):
        compare.main(["--shapes", "nobody", "--out", str(tmp_path / "x.json")])
    if not torch.cuda.is_available():
        assert compare.main(["--tokens", "16", "--out", str(tmp_path / "x.json")]) == 2
        assert "no CUDA device" in capsys.readouterr().out
