"""`fp8moe repro` of a relation: which of its two calls shows the mismatch, and both calls in what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bits import digest
from conformance.cases import Case
from conformance.oracles import tensors_of
from conformance.plan import Subject, resolve_target
from conformance.relations import RELATIONS, relation_case
from conformance.repro import Again, dumped, run_again, told_mismatch
from conformance.results import Status
from conformance.zoo import TORCH
from fp8moe.backends.torch_experts import TorchExperts
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)

SMALL = Case(experts=4, hidden=144, inter=128, tokens=17, values="block_scales", seed=1)
HERE = resolve_target("cpu")
MUTANT = "conformance.zoo:TORCH.expert0_scale"
HONEST = Subject("TorchExperts", TorchExperts, "TorchExperts")


class FirstRow(TorchExperts):
    """Its first row is another, whichever token that is."""

    contract = replace(TorchExperts.contract, deterministic=True, batch_invariant=True)

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().apply(*args, **kwargs)
        result[0] += 1
        return result


def call_of(again: Again, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a call by their own names, found by what the metadata say; and those names."""
    tensors, told = dumped(again)
    names = json.loads(told[name])["tensors"]
    return {own: tensors[written] for own, written in names.items()}, names


def test_the_experts_are_those_of_the_call_with_the_mismatch() -> None:
    again = run_again(SMALL, Subject("mutant", TORCH.expert0_scale, MUTANT), HERE, relation("expert_relabelling"))
    found, told = again.mismatch, dict(told_mismatch(again))
    assert found is not None
    second, _ = call_of(again, "second")
    ids = second["topk_ids"][found.token].tolist()
    assert ids != tensors_of(SMALL, "cpu").topk_ids[found.token].tolist()
    assert [slot.partition(" ")[0] for slot in told["experts of the token"].split(", ")] == [str(id) for id in ids]
    assert found.expert in ids
    assert told["first call"] == "the case's own"
    assert told["second call"].endswith("; the mismatch is in this one")
    scale = float(second["w2_scale"][found.expert, found.column // 128, 0])
    assert told["scale of w2 there"] == f"w2_scale[{found.expert}, {found.column // 128}] = {scale:.6g}"
    row, column = found.token, found.column
    assert float(second["expected"][row, column]) == found.expected
    assert float(second["got"][row, column]) == found.got
    assert float(second["bound"][row, column]) == found.bound


def test_a_token_that_was_moved_is_told_with_its_row() -> None:
    again = run_again(SMALL, Subject("first row", FirstRow, ""), HERE, relation("token_permutation"))
    found, told = again.mismatch, dict(told_mismatch(again))
    assert found is not None
    second, _ = call_of(again, "second")
    row = int(told["token"].removesuffix(" of that call").rpartition(" ")[2])
    own = tensors_of(SMALL, "cpu")
    assert row != found.token
    assert torch.equal(second["hidden_states"][row], own.hidden_states[found.token])
    assert float(second["got"][row, found.column]) == found.got
    assert float(second["expected"][row, found.column]) == found.expected
    assert told["experts of the token"].startswith(f"{int(second['topk_ids'][row, 0])} (weight ")


def test_a_call_that_is_judged_by_itself_is_the_only_one() -> None:
    again = run_again(SMALL, Subject("mutant", TORCH.expert0_scale, MUTANT), HERE, relation("absent_slots"))
    assert again.calls == {"only": "with slots of id -1 and weight 0"}
    tensors, names = call_of(again, "only")
    assert bool((tensors["topk_ids"] == -1).any())
    assert (names["topk_ids"], names["w13"]) == ("only.topk_ids", "w13")


@pytest.mark.parametrize("check", RELATIONS, ids=lambda check: check.id.rpartition(".")[2])
def test_what_is_written_of_each_call_runs_again(check: Any) -> None:
    """An honest backend given the tensors of a call gives that call's output."""
    case = relation_case(check, "block", "swigluoai" if "clamp" in check.id else "silu")
    again = run_again(case, HONEST, HERE, check.id, keep=True)
    if again.result.status is Status.NOT_APPLICABLE:
        pytest.skip(f"nothing is called: {again.result.reason}")
    assert again.result.status is Status.PASSED
    trial, compared = again.trial, again.compared
    assert trial is not None
    assert compared is not None
    for name, given in (("first", compared.first), (compared.last, compared.second)):
        if given is None:
            continue
        written, _ = call_of(again, name)
        layer = {field: written.get(field) for field in vars(given.weights)}
        backend = TorchExperts(given.config, given.quant, replace(given.weights, **layer))
        arguments = (written["hidden_states"], written["topk_weights"], written["topk_ids"])
        output = backend.apply(*arguments, expert_map=written.get("expert_map"))
        rows = written.get("rows")
        got = written["got"]
        assert digest(output if rows is None or len(got) == len(output) else output[rows]) == digest(got)


def test_both_calls_are_in_the_file_and_the_command_says_which_is_which(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the tensors of a case are written by safetensors")
    path = tmp_path / "case.safetensors"
    options = ("--backend", MUTANT, "--device", "cpu", "--check", "relation.expert_relabelling", "--dump", str(path))
    done = run("repro", str(SMALL), *options, status=1)
    assert "  first.NAME is the first call's: the case's own\n" in done.stdout
    assert "  second.NAME is the second call's: with local experts in the order [" in done.stdout
    with safetensors.safe_open(path, "pt") as file:
        names, told = set(file.keys()), file.metadata()
    assert {"w13", "second.w13", "topk_ids", "second.topk_ids", "second.got", "second.expected"} <= names
    for call in ("first", "second"):
        assert set(json.loads(told[call])["tensors"].values()) <= names


def relation(name: str) -> str:
    return f"computes.relation.{name}"
