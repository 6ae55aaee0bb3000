"""The registry: backends from outside the tree join by a call, checked when they do, and leave."""

import copy
import pickle
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pytest

from fp8moe.config import FusedMoEActivationFormat
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, contract_violations
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import (
    BackendContractError,
    BackendSpec,
    Fp8MoeBackend,
    OutOfTreeBackend,
    Position,
    Reason,
    backend_named,
    default_backends,
    register_backend,
    registered_backends,
    seed_backends,
    unregister_backend,
)
from fp8moe.schemes import BLOCK
from fp8moe.selector import explain_fp8_moe_backend, select_fp8_moe_backend
from tests.unit.out_of_tree import LAYER, SEED_NAMES, Acme, BatchedAcme, class_with, emptied, order, refused


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from emptied(monkeypatch)


# -- the eleven --


def test_seed_order() -> None:
    assert SEED_NAMES == [
        "AITER",
        "FLASHINFER_TRTLLM",
        "FLASHINFER_CUTLASS",
        "DEEPGEMM",
        "BATCHED_DEEPGEMM",
        "VLLM_CUTLASS",
        "BATCHED_VLLM_CUTLASS",
        "TRITON",
        "BATCHED_TRITON",
        "MARLIN",
        "XPU",
    ]
    assert order() == SEED_NAMES
    assert {member.name for member in Fp8MoeBackend} == {*SEED_NAMES, "NONE"}
    assert all(member.value == member.name for member in Fp8MoeBackend)
    assert registered_backends() == ()


def test_seed_classes_keep_the_contract() -> None:
    for spec in seed_backends():
        assert contract_violations(spec.experts_cls) == []
        assert spec.backend is Fp8MoeBackend[spec.name]
        assert spec.returns_class is (spec.name != "FLASHINFER_TRTLLM")
        batched = spec.name.startswith("BATCHED_")
        assert (spec.experts_cls.activation_format() is FusedMoEActivationFormat.BatchedExperts) is batched


def test_reasons() -> None:
    names = "DEVICE GATING ACTIVATION SCHEME PARALLEL ROUTING FORMAT LOGITS_DTYPE DISABLED_BY_ENV NOT_ALLOWED"
    assert [reason.name for reason in Reason] == names.split()
    assert all(reason.value == reason.name for reason in Reason)


# -- by a call --


@pytest.mark.parametrize("neighbour", SEED_NAMES)
def test_a_position_beside_each_of_the_eleven(neighbour: str) -> None:
    index = SEED_NAMES.index(neighbour)
    register_backend("ACME", Acme, before=neighbour)
    assert order() == [*SEED_NAMES[:index], "ACME", *SEED_NAMES[index:]]
    unregister_backend("ACME")
    register_backend("ACME", Acme, after=neighbour)
    assert order() == [*SEED_NAMES[: index + 1], "ACME", *SEED_NAMES[index + 1 :]]
    unregister_backend("ACME")
    assert order() == SEED_NAMES


def test_beside_a_registered_one() -> None:
    register_backend("FIRST", Acme, before="TRITON")
    register_backend("SECOND", BatchedAcme, after="FIRST")
    index = order().index("TRITON")
    assert order()[index - 2 : index + 1] == ["FIRST", "SECOND", "TRITON"]


def test_of_two_with_one_neighbour_the_later_is_next_to_it() -> None:
    for name in ("A", "B"):
        register_backend(name, Acme, before="TRITON")
    for name in ("C", "D"):
        register_backend(name, Acme, after="TRITON")
    index = order().index("TRITON")
    assert order()[index - 2 : index + 3] == ["A", "B", "TRITON", "D", "C"]


def test_without_a_position_it_is_named_and_never_scanned() -> None:
    spec = register_backend("ACME", Acme)
    assert order() == SEED_NAMES
    assert registered_backends() == (spec,)
    assert backend_named("ACME") is spec
    assert all(
        verdict.backend != spec.backend
        for verdict in explain_fp8_moe_backend(LAYER, *BLOCK, platform=PLATFORMS["cpu"], env={}).verdicts
    )


def test_a_whole_spec() -> None:
    spec = BackendSpec("ACME", Acme, Position(after="XPU"))
    assert register_backend(spec) is spec
    assert default_backends()[-1] is spec


def test_it_is_selected_by_a_scan() -> None:
    register_backend("ACME", Acme, before="AITER")
    backend, cls = select_fp8_moe_backend(LAYER, *BLOCK, platform=PLATFORMS["cpu"], env={})
    assert backend == OutOfTreeBackend("ACME")
    assert cls is Acme
    unregister_backend("ACME")
    assert select_fp8_moe_backend(LAYER, *BLOCK, platform=PLATFORMS["cpu"], env={}) == (Fp8MoeBackend.NONE, None)


def test_its_object_is_like_a_member_of_the_enum() -> None:
    backend = register_backend("ACME", Acme).backend
    assert (backend.name, backend.value) == ("ACME", "ACME")
    assert backend == OutOfTreeBackend("ACME")
    assert backend != Fp8MoeBackend.TRITON
    assert sorted([OutOfTreeBackend("B"), OutOfTreeBackend("A")]) == [OutOfTreeBackend("A"), OutOfTreeBackend("B")]
    assert len({backend, OutOfTreeBackend("ACME"), Fp8MoeBackend.TRITON}) == 2
    for twin in (copy.copy(backend), pickle.loads(pickle.dumps(backend))):
        assert twin == backend
    assert "ACME" not in Fp8MoeBackend.__members__


def test_unregister() -> None:
    register_backend("ACME", Acme, before="TRITON")
    unregister_backend("ACME")
    with pytest.raises(KeyError, match="ACME"):
        unregister_backend("ACME")
    with pytest.raises(KeyError, match="TRITON"):
        unregister_backend("TRITON")
    with pytest.raises(KeyError, match=r"'ACME'.*AITER"):
        backend_named("ACME")
    register_backend("ACME", Acme)


def test_unregistering_a_neighbour_leaves_an_order() -> None:
    register_backend("FIRST", Acme, before="TRITON")
    register_backend("SECOND", BatchedAcme, after="FIRST")
    try:
        unregister_backend("FIRST")
    except BackendContractError as error:  # refusing is fine as well
        assert "SECOND" in str(error)  # noqa: PT017
    assert set(SEED_NAMES) <= set(order())


# -- refusals: each leaves the registry as it was --


@pytest.mark.parametrize("name", ["TRITON", "triton", "Batched_DeepGemm"])
def test_a_name_of_the_eleven_is_taken(name: str) -> None:
    refused(rf"{name}.*taken by backend '{name.upper()}'", name, Acme)


def test_a_name_twice() -> None:
    register_backend("ACME", Acme)
    refused("'acme'.*taken by backend 'ACME'", "acme", BatchedAcme)


@pytest.mark.parametrize("name", ["NONE", "none"])
def test_none_is_no_name(name: str) -> None:
    refused("no backend", name, Acme)


def test_an_empty_name() -> None:
    refused("expected a name that can be typed", "", Acme)
    refused("expected a name that can be typed", BackendSpec(None, Acme))  # type: ignore[arg-type]


def test_no_class() -> None:
    refused("'ACME'.*expected an experts class", "ACME")


@pytest.mark.parametrize("spec", [17, None, Acme])
def test_neither_a_name_nor_a_spec(spec: Any) -> None:
    refused("expected a .*BackendSpec", spec, Acme)


def test_an_unknown_neighbour() -> None:
    refused(r"'ACME'.*beside 'TRITTON'.*known: AITER.*TRITON", "ACME", Acme, before="TRITTON")
    refused(r"'ACME'.*beside 'ACME'", "ACME", Acme, after="ACME")


def test_both_neighbours() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        register_backend("ACME", Acme, before="TRITON", after="XPU")
    with pytest.raises(ValueError, match="exactly one"):
        Position()
    assert registered_backends() == ()


def test_a_position_of_another_type() -> None:
    refused("'ACME'.*[Pp]osition", BackendSpec("ACME", Acme, "TRITON"))  # type: ignore[arg-type]


def test_a_position_beside_a_whole_spec_is_not_dropped() -> None:
    try:
        register_backend(BackendSpec("ACME", Acme), before="TRITON")
    except (BackendContractError, TypeError, ValueError):
        return  # refusing is fine; never scanning it without a word is not
    assert "ACME" in order()


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (object, "expected a subclass of FusedMoEPermuteExpertsUnpermute"),
        ("acme.moe:Acme", "expected a subclass of FusedMoEPermuteExpertsUnpermute"),
        (class_with(activation_format=lambda self: FusedMoEActivationFormat.Standard), "make it a staticmethod"),
        (
            class_with(activation_format=staticmethod(lambda: "standard")),
            "gave 'standard': expected a FusedMoEActivation",
        ),
        (class_with(apply=FusedMoEPermuteExpertsUnpermute.apply), r"does not implement apply\(\)"),
        (
            class_with(
                apply=FusedMoEPermuteExpertsUnpermute.apply,
                activation_format=staticmethod(lambda: FusedMoEActivationFormat.BatchedExperts),
            ),
            r"does not implement apply_batched\(\)",
        ),
        (class_with(support={"silu"}), "support is set: expected a fp8moe.support.Support"),
        (
            class_with(
                support=seed_backends()[0].experts_cls.support,
                activation_format=staticmethod(lambda: FusedMoEActivationFormat.BatchedExperts),
            ),
            "support.activation_format differs",
        ),
        (class_with(is_supported_config=lambda *_: (True, None)), "is_supported_config is no staticmethod"),
        (class_with(contract={"deterministic": True}), "contract is dict: expected a Contract"),
        (
            class_with(apply=lambda self, hidden_states, topk_weights, topk_ids: hidden_states),
            "apply lacks the keyword expert_map, apply_router_weight_on_input, output",
        ),
        (
            class_with(apply=lambda self, x, w, i, expert_map=None, output=None: x),
            "apply lacks the keyword apply_router_weight_on_input",
        ),
        (
            class_with(apply=lambda self, x, *, expert_map=None, apply_router_weight_on_input=False, output=None: x),
            "apply",
        ),
        (class_with(warm_up=abstractmethod(lambda self: None)), "warm_up"),
    ],
)
def test_a_class_that_breaks_the_contract(cls: Any, wrong: str) -> None:
    refused(rf"'ACME'.*{wrong}", "ACME", cls, before="TRITON")


def test_all_violations_are_told_at_once() -> None:
    cls = class_with(contract=None, support=3, apply=lambda self: None)
    refused("contract is NoneType.*apply lacks|apply lacks.*contract is NoneType", "ACME", cls)
