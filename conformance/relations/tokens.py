"""Relations between tokens: their order, copies of one, parts of a batch, NaN in one of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from conformance.named_check import Check, Exactness
from conformance.relations.changed import rows, shuffled
from conformance.relations.grounds import fewer_tokens, shared_scale, token_by_token, unless
from conformance.trial import Trial
from fp8moe.counted import counted

COPIES = 3
"""How often each token is there, at places far from one another."""
SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
"""Batches in which a token must come out the same: around the heights of tiles."""
JUDGED_SIZES = (1, 3)
"""The same where the bound judges, which is all that two calls can be held to: the rest is equivalence's."""


def token_permutation(trial: Trial) -> None:
    """f(Px) = P f(x). A dynamic scale that all tokens share stays what it is."""
    order = shuffled(trial, "tokens", trial.case.tokens)
    moved = rows(trial.tensors, order)
    output, again = trial.call(), trial.call(moved)
    what = "with its tokens in another order"
    origin = (trial.tensors, output)
    trial.same(moved, output[order], again, what, exact=trial.row_by_row, origin=origin, tokens=order)


def duplicate_tokens(trial: Trial) -> None:
    """Tokens with equal rows and routes in one call have equal outputs, wherever they stand."""
    tokens = trial.case.tokens
    source = torch.arange(tokens, device=trial.tensors.hidden_states.device) % -(-tokens // COPIES)
    copies = rows(trial.tensors, source)
    output = trial.call(copies)
    what, exact = "a token's copies in one batch", trial.row_by_row
    trial.same(copies, output[source], output, what, exact=exact, before=(copies, output))


def chunks(trial: Trial) -> None:
    """f([x; y]) = [f(x); f(y)], in parts of a third and two thirds."""
    tensors = trial.tensors
    output = trial.call()
    everyone = torch.arange(trial.case.tokens, device=output.device)
    cut = max(1, trial.case.tokens // 3)
    for name, part in (("first", everyone[:cut]), ("last", everyone[cut:])):
        alone = rows(tensors, part)
        what = f"the {name} {len(part)} of {counted(len(everyone), 'token')} in a call of their own"
        exact, origin = token_by_token(trial, alone), (tensors, output)
        trial.same(alone, output[part], trial.call(alone), what, exact=exact, origin=origin, tokens=part)


def batch_invariance(trial: Trial) -> None:
    """A row alone, and at the end of batches of other sizes, is the row in the whole batch."""
    tokens, output = trial.case.tokens, trial.call()
    everyone = torch.arange(tokens, device=output.device)
    alone = rows(trial.tensors, everyone[:1])
    declared = token_by_token(trial, alone)
    for size in SIZES if declared else JUDGED_SIZES:
        if size >= tokens:
            break
        for last in {0, tokens - 1}:
            part = (everyone + last - size + 1)[:size] % tokens
            batch = rows(trial.tensors, part)
            got = trial.call(batch)
            what = f"token {last} at the end of a batch of {size}"
            trial.same(batch, output[part], got, what, exact=token_by_token(trial, batch), tokens=part)


def nan_containment(trial: Trial) -> None:
    """NaN in one token's hidden states and an infinity in another's reach no other token.

    What the two themselves become is not said.
    """
    tensors = trial.tensors
    tokens, hidden = trial.case.tokens, tensors.hidden_states.clone()
    spoilt = {tokens // 2: torch.nan, tokens - 1: torch.inf}
    for token, value in spoilt.items():
        hidden[token, token % hidden.shape[1]] = value
    others = torch.tensor([token for token in range(tokens) if token not in spoilt], device=hidden.device)
    given = replace(tensors, hidden_states=hidden)
    output, got = trial.call(), trial.call(given)
    what = f"with NaN in token {tokens // 2} and an infinity in token {tokens - 1}"
    if trial.row_by_row:
        trial.equal(output[others], got[others], what, others, given=given, rows=others)
    elif not torch.equal(output[others], got[others]):
        trial.within(given, got, what, others)


TOKENS = (
    Check(
        "computes.relation.token_permutation",
        "tokens in another order give the same results in that order",
        Exactness.ROW_BY_ROW,
        token_permutation,
        fewer_tokens(2),
    ),
    Check(
        "computes.relation.duplicate_tokens",
        "tokens with equal rows and routes have equal outputs",
        Exactness.ROW_BY_ROW,
        duplicate_tokens,
        fewer_tokens(2),
    ),
    Check(
        "computes.relation.chunks",
        "two parts of a batch, each in a call of its own, give what the batch gives",
        Exactness.ROW_BY_ROW,
        chunks,
        unless(shared_scale, fewer_tokens(2)),
    ),
    Check(
        "computes.relation.batch_invariance",
        "a token's result is the same alone and in batches of any size",
        Exactness.ROW_BY_ROW,
        batch_invariance,
        unless(shared_scale, fewer_tokens(2)),
    ),
    Check(
        "computes.relation.nan_containment",
        "NaN and infinity in a token's hidden states stay in that token's output",
        Exactness.ROW_BY_ROW,
        nan_containment,
        unless(shared_scale, fewer_tokens(3)),
    ),
)
