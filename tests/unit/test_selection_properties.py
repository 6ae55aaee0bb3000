"""The selector over any input, malformed texts and odd devices too: it agrees with the model, and it is pure."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.selection.agreement import arguments, expected, explain_disagrees, outcome, select_disagrees
from conformance.selection.draw import Call, calls, environments
from conformance.selection.model import RULES
from conformance.selection.triples import committed, observed, triples_of
from fp8moe import PLATFORMS, explain_fp8_moe_backend

MANY = settings(max_examples=600, deadline=None)


@MANY
@given(calls())
def test_select_agrees_with_the_model(call: Call) -> None:
    assert select_disagrees(call) is None


@MANY
@given(calls())
def test_explain_agrees_with_the_model(call: Call) -> None:
    assert explain_disagrees(call) is None


@MANY
@given(calls())
def test_explain_agrees_with_select(call: Call) -> None:
    positional, keywords = arguments(call)
    selection = explain_fp8_moe_backend(*positional, **keywords)

    def answer(*_: object, **__: object) -> object:
        if selection.error is not None:
            raise selection.error
        return selection.backend, selection.experts_cls

    assert outcome(call, answer) == outcome(call)


@MANY
@given(calls())
def test_two_calls_give_the_same_and_change_nothing(call: Call) -> None:
    env = copy.copy(call.env)
    first = outcome(call)
    assert outcome(call) == first
    assert outcome(call._replace(config=copy.deepcopy(call.config), platform=copy.deepcopy(call.platform))) == first
    assert dict(call.env) == dict(env)


@MANY
@given(calls(), st.randoms(use_true_random=False))
def test_the_order_of_the_environment_does_not_matter(call: Call, random: object) -> None:
    items = list(call.env.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert outcome(call._replace(env=dict(items))) == outcome(call)


@settings(max_examples=300, deadline=None)
@given(calls())
def test_no_triple_outside_the_committed_list_occurs(call: Call) -> None:
    whole = call._replace(order=None)
    permitted = set(committed())
    assert {triple for triple, mask in triples_of(expected(whole), (1,)) if mask.any()} <= permitted
    positional, keywords = arguments(whole)
    assert observed(explain_fp8_moe_backend(*positional, **keywords)) <= permitted


def test_the_strategy_reaches_every_rule() -> None:
    reached = set()

    @settings(max_examples=1_000, deadline=None, derandomize=True, database=None)
    @given(calls())
    def collect(call: Call) -> None:
        reached.add(RULES[int(expected(call).rule)])

    collect()
    assert reached == set(RULES)


@settings(max_examples=200, deadline=None)
@given(calls(), environments(), st.sampled_from(sorted(PLATFORMS)))
def test_a_call_in_between_changes_nothing(call: Call, env: dict[str, str], name: str) -> None:
    first = outcome(call)
    outcome(call._replace(env=env))
    outcome(call._replace(platform=PLATFORMS[name]))
    assert outcome(call) == first
