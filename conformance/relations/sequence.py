"""Relations between calls: what came before, other layers beside this one, repeats, work that is left running."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.capture import capturing
from conformance.named_check import Check, Exactness
from conformance.relations.changed import every_expert, rows, shuffled
from conformance.relations.grounds import deterministic, fewer_tokens, not_applicable, token_by_token
from conformance.trial import Trial, guarded
from fp8moe.counted import counted

REPEATS = 20
SIMULATED_REPEATS = 3
LARGER = 3
"""Times as many tokens in the larger call, within what the configuration allows."""
WHILE_S = 0.005
"""What a thread that outlives its call gets to show itself."""
REPLAYS = 3


def sequence(trial: Trial) -> None:
    """A, B, A gives A twice, for B with more tokens, with fewer, with one, and with as many that all go one way; and
    the same of a backend that has seen B first."""
    tensors, tokens = trial.tensors, trial.case.tokens
    everyone = torch.arange(tokens, device=tensors.hidden_states.device)
    more = everyone.repeat(LARGER).flip(0)[: tensors.config.max_num_tokens]
    first = trial.call()
    kept = first.clone()
    for between in (more, everyone[: tokens // 2].flip(0), everyone[-1:]):
        trial.call(rows(tensors, between))
        what = f"after a call with {counted(len(between), 'token')}"
        trial.same(tensors, kept, trial.call(), what, exact=deterministic(trial))
    alike = replace(tensors, topk_ids=tensors.topk_ids[-1:].expand_as(tensors.topk_ids).contiguous())
    trial.within(alike, trial.call(alike), "with every token on the last one's experts, after other calls")
    trial.same(tensors, kept, trial.call(), "after a call with every token alike", exact=deterministic(trial))
    fresh = trial.made(tensors)
    trial.call(rows(tensors, everyone[-1:]), backend=fresh)
    again = trial.call(backend=fresh)
    trial.same(tensors, kept, again, "in a backend whose first call had one token", exact=deterministic(trial))


def reload(trial: Trial) -> None:
    """Two backends made from the same weights give the same; one with other weights in between changes neither.

    What making a backend does to the weights, `Trial.call` sees.
    """
    tensors = trial.tensors
    order = shuffled(trial, "other layer", tensors.config.num_local_experts)
    other = replace(tensors, weights=every_expert(tensors.weights, lambda tensor: tensor[order]))
    first = trial.call()
    stranger = trial.made(other)
    trial.within(other, trial.call(other, backend=stranger), "another layer of the same backend, made later")
    exact = deterministic(trial)
    trial.same(tensors, first, trial.call(), "after another layer was made and called", exact=exact)
    again = trial.call(backend=trial.made(tensors))
    trial.same(tensors, first, again, "made a second time from the same weights", exact=exact)


def repeat(trial: Trial) -> None:
    """The same call has the same bits again, every time."""
    if not trial.contract.deterministic:
        raise not_applicable("it does not declare that it is deterministic")
    first = trial.call().clone()
    for number in range(2, (SIMULATED_REPEATS if trial.simulated else REPEATS) + 1):
        trial.equal(first, trial.call(), f"it declares that it is deterministic; call {number} of the same")


def settled(trial: Trial) -> None:
    """When `apply` returns, its work is in the stream (on a CPU: done): a copy made in its order is the result.

    Given an output full of NaN, and without one; nothing here waits for the device before the copy.
    """
    tensors = trial.tensors
    trial.call()  # what is compiled, loaded or allocated only once is no part of this
    given = torch.full_like(tensors.hidden_states, torch.nan, memory_format=torch.contiguous_format)
    for output in (given, None):
        with guarded("apply"):
            result = tensors.call(trial.backend, output)
        copy = result.clone()
        if result.device.type == "cuda":
            torch.cuda.synchronize()
        time.sleep(WHILE_S)
        trial.equal(copy, result, "the result right after the return, and a while later")


def graph_replay(trial: Trial) -> None:
    """A captured call, replayed on other inputs in the same memory, gives what it gives without a graph.

    Larger eager calls lie between the replays, so that memory which the graph still uses would be overwritten. Under
    capture the shapes inside may be the largest ones, so bits are compared only where they do not depend on them.
    """
    tensors = trial.tensors
    if trial.target.device != "cuda":
        raise not_applicable("graphs are captured on CUDA devices")
    if not trial.contract.graph_capturable:
        raise not_applicable("it does not declare that it can be captured")
    tokens = trial.case.tokens
    everyone = torch.arange(tokens, device=tensors.hidden_states.device)
    more = rows(tensors, everyone.repeat(LARGER)[: tensors.config.max_num_tokens])
    buffers = {name: getattr(tensors, name).clone() for name in ("hidden_states", "topk_weights", "topk_ids")}
    captured = replace(tensors, **buffers)
    trial.call(captured)  # compiles, and allocates what is kept
    with guarded("a captured call"), capturing() as graph:
        result = captured.call(trial.backend)
    for replay in range(REPLAYS):
        given = rows(tensors, everyone.roll(replay))
        _fill(buffers, given)
        trial.call(more)
        with guarded("the replay of a captured call"):
            graph.replay()
            torch.cuda.synchronize()
        got = result.clone()
        expected = trial.call(given)
        exact = trial.row_by_row and token_by_token(trial, given)
        what = f"replay {replay + 1} of a captured call"
        trial.same(given, expected, got, what, exact=exact, origin=(given, expected))


def _fill(buffers: dict[str, Tensor], given: CaseTensors) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(getattr(given, name))


SEQUENCE = (
    Check(
        "computes.relation.sequence",
        "a call gives what it gave before, whatever calls came in between",
        Exactness.DETERMINISTIC,
        sequence,
        fewer_tokens(2),
    ),
    Check(
        "computes.relation.reload",
        "backends made from the same weights give the same, and leave each other alone",
        Exactness.DETERMINISTIC,
        reload,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.repeat",
        "a backend that declares that it is deterministic gives the same bits every time",
        Exactness.DETERMINISTIC,
        repeat,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.settled",
        "a result is there when the call returns, in the order of the stream",
        Exactness.ALWAYS,
        settled,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.graph_replay",
        "a captured call replayed on other inputs gives what it gives without a graph",
        Exactness.ROW_BY_ROW,
        graph_replay,
        fewer_tokens(1),
    ),
)
