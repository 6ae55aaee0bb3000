"""The registry: backends that join by an entry point."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fp8moe
from fp8moe.platforms import PLATFORMS
from fp8moe.plug_ins import STRICT, BrokenPlugInWarning
from fp8moe.registry import (
    BackendContractError,
    BackendSpec,
    Fp8MoeBackend,
    Position,
    backend_named,
    broken_plug_ins,
    default_backends,
    register_backend,
    registered_backends,
    seed_backends,
    unregister_backend,
)
from fp8moe.schemes import BLOCK
from fp8moe.selector import select_fp8_moe_backend
from tests.unit.out_of_tree import (
    LAYER,
    SEED_NAMES,
    Acme,
    BatchedAcme,
    class_with,
    emptied,
    order,
    plug_in,
    plug_ins,
    refused,
)


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from emptied(monkeypatch)


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


class Shouting(str):
    def upper(self) -> str:
        sys.exit(0)


def spec_function() -> BackendSpec:
    return BackendSpec("ACME", Acme, Position(before="TRITON"))


@pytest.mark.parametrize("target", [spec_function(), spec_function, lambda: Acme])
def test_what_an_entry_point_may_name(monkeypatch: pytest.MonkeyPatch, target: object) -> None:
    plug_ins(monkeypatch, plug_in("ACME", target))
    (spec,) = registered_backends()
    assert (spec.name, spec.experts_cls, spec.distribution) == ("ACME", Acme, "acme-kernels")
    assert ("ACME" in order()) is (target is not None and spec.position is not None)


def test_an_entry_point_that_names_a_class_is_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", Acme))
    assert backend_named("ACME").experts_cls is Acme
    assert order() == SEED_NAMES


def test_entry_points_come_before_calls_and_in_the_order_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("B", BatchedAcme, "b-kernels"), plug_in("A", Acme, "a-kernels"))
    register_backend("0", Acme)
    assert [spec.name for spec in registered_backends()] == ["A", "B", "0"]


def test_entry_points_may_stand_beside_each_other_whatever_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    first = BackendSpec("A", Acme, Position(after="Z"))
    plug_ins(monkeypatch, plug_in("A", first), plug_in("Z", BackendSpec("Z", BatchedAcme, Position(after="XPU"))))
    assert order() == [*SEED_NAMES, "Z", "A"]


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        (ImportError("libacme.so: no such file"), "'ACME' of acme-kernels .*loading it raised ImportError: libacme.so"),
        (pytest.skip.Exception("no GPU"), "'ACME' of acme-kernels .*loading it raised Skipped: no GPU"),
        (SystemExit(1), "'ACME' of acme-kernels .*loading it raised SystemExit"),
        (lambda: 1 / 0, "'ACME' of acme-kernels .*loading it raised ZeroDivisionError"),
        (object(), "'ACME' of acme-kernels .*expected a BackendSpec"),
        (lambda: None, "'ACME' of acme-kernels .*expected a BackendSpec"),
        (int, "'ACME' of acme-kernels: .*expected a subclass"),
        (Mute(), "'ACME' of acme-kernels .*loading it raised Mute: .its text raised ValueError"),
        (ImportError("\x1b[31m\nred"), r"'ACME' of acme-kernels .*loading it raised ImportError: \\x1b\[31m red"),
        (BackendSpec(Shouting("ACME"), Acme), "'ACME' of acme-kernels .*asking what it is raised SystemExit: 0"),
        (BackendSpec("A\x1b[31mCME", Acme), r"BackendSpec.name='A\\x1b\[31mCME': expected a name that can be typed"),
        (BackendSpec("A" * 101, Acme), "AAA.: expected a name that can be typed"),
        (BackendSpec("TorchExperts", Acme), "'TorchExperts' of acme-kernels: the name stands for a backend of fp8moe"),
        (
            class_with(activation_format=staticmethod(lambda: sys.exit(0))),
            r"activation_format\(\) raised SystemExit: 0",
        ),
        (BackendSpec("TRITON", Acme), "'TRITON' of acme-kernels: the name is taken by backend 'TRITON'"),
        (class_with(contract=None), "'ACME' of acme-kernels: Broken.contract is NoneType"),
        (BackendSpec("ACME", Acme, Position(before="NOWHERE")), "'ACME' of acme-kernels: position is beside 'NOWHERE'"),
    ],
)
def test_a_broken_plug_in_is_named_with_its_distribution(
    monkeypatch: pytest.MonkeyPatch, target: object, wrong: str
) -> None:
    plug_ins(monkeypatch, plug_in("ACME", target), plug_in("GOOD", BackendSpec("GOOD", Acme, Position(after="XPU"))))
    with pytest.warns(BrokenPlugInWarning, match=wrong) as told:
        assert order() == [*SEED_NAMES, "GOOD"]
    assert len(told) == 1
    assert "left out of the order" in str(told[0].message)
    assert "uninstall acme-kernels; FP8MOE_STRICT_PLUG_INS=1 makes this an error" in str(told[0].message)
    (broken,) = broken_plug_ins()
    assert (broken.name, broken.distribution) == ("ACME", "acme-kernels")
    assert re.search(wrong, broken.error)
    assert [spec.name for spec in registered_backends()] == ["GOOD"]
    with pytest.raises(BackendContractError, match=wrong):
        backend_named("ACME")
    with warnings.catch_warnings():  # told once, whatever comes later
        warnings.simplefilter("error")
        register_backend("LATER", Acme)
        assert order() == [*SEED_NAMES, "GOOD"]


def test_a_broken_plug_in_is_an_error_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", OSError("gone")), plug_in("GOOD", Acme))
    monkeypatch.setenv(STRICT, "1")
    for _ in range(2):
        with pytest.raises(BackendContractError, match=r"'ACME' of acme-kernels .*OSError: gone"):
            default_backends()
    assert backend_named("GOOD").experts_cls is Acme  # no name stands for another backend
    monkeypatch.setenv(STRICT, "0")
    with pytest.warns(BrokenPlugInWarning):
        assert order() == SEED_NAMES


def test_the_warning_is_shown_by_default() -> None:
    assert issubclass(fp8moe.BrokenPlugInWarning, UserWarning)  # others are hidden, Python's own filters say
    assert fp8moe.BrokenPlugInWarning is BrokenPlugInWarning


def test_a_plug_in_that_takes_a_name_of_the_eleven_leaves_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("TRITON", Acme))
    assert backend_named("TRITON") in seed_backends()
    assert "'TRITON' of acme-kernels: the name is taken" in broken_plug_ins()[0].error


def test_no_plug_in_is_imported_for_one_of_the_eleven(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", KeyboardInterrupt()))
    assert [backend_named(name) for name in SEED_NAMES] == list(seed_backends())
    with pytest.raises(KeyboardInterrupt):  # somebody's Ctrl-C while a module is imported
        backend_named("ACME")


def test_a_plug_in_beside_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = BackendSpec("B", Acme, Position(after="A"))
    plug_ins(monkeypatch, plug_in("A", OSError("gone")), plug_in("B", beside, "b-kernels"))
    with pytest.warns(BrokenPlugInWarning) as told:
        assert order() == SEED_NAMES
    assert [each.name for each in broken_plug_ins()] == ["A", "B"]
    assert "'B' of b-kernels: position is beside 'A'" in str(told[1].message)


def test_two_plug_ins_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", Acme, "acme-kernels"), plug_in("acme", BatchedAcme, "other-kernels"))
    with pytest.warns(BrokenPlugInWarning, match="'acme' of other-kernels: the name is taken by .* of acme-kernels"):
        default_backends()
    assert backend_named("ACME").distribution == "acme-kernels"
    with pytest.raises(BackendContractError, match="other-kernels"):
        backend_named("acme")


def test_of_two_plug_ins_with_equal_names_the_first_by_distribution_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", Acme, "b-kernels"), plug_in("ACME", BatchedAcme, "a-kernels"))
    assert backend_named("ACME").distribution == "a-kernels"
    assert [each.distribution for each in broken_plug_ins()] == ["b-kernels"]


def test_entry_points_of_one_name_with_specs_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = BackendSpec("A", Acme), BackendSpec("B", BatchedAcme)
    plug_ins(monkeypatch, plug_in("ACME", a, "a-kernels"), plug_in("ACME", b, "b-kernels"))
    assert [spec.name for spec in registered_backends()] == ["A", "B"]


def test_a_call_cannot_take_a_plug_ins_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", Acme))
    refused("'ACME'.*taken by backend 'ACME' of acme-kernels", "ACME", BatchedAcme)


def test_a_plug_in_without_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", OSError("gone"), None))
    with pytest.warns(BrokenPlugInWarning, match="'ACME' of an unknown distribution"):
        default_backends()


def test_a_broken_plug_in_does_not_stop_a_question_with_candidates_given(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_ins(monkeypatch, plug_in("ACME", OSError("gone")))
    given: dict[str, Any] = {"platform": PLATFORMS["h100"], "env": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = select_fp8_moe_backend(LAYER, *BLOCK, **given, backends=seed_backends())[0]
    assert chosen is Fp8MoeBackend.FLASHINFER_CUTLASS
    with pytest.warns(BrokenPlugInWarning, match="OSError: gone"):
        assert select_fp8_moe_backend(LAYER, *BLOCK, **given)[0] is chosen


def test_the_selector_names_a_predicate_that_raises() -> None:
    def asks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no license")

    answers: list[tuple[Callable[..., Any], str]] = [
        (asks, "ACME.*raised RuntimeError: no license"),
        (lambda *_, **__: True, "ACME.*raised TypeError"),
        (lambda *_, **__: (False, "too old"), "ACME.*refused with 'too old': expected a fp8moe.Reason"),
    ]
    for predicate, wrong in answers:
        register_backend("ACME", class_with(is_supported_config=staticmethod(predicate)), before="AITER")
        with pytest.raises(BackendContractError, match=wrong):
            select_fp8_moe_backend(LAYER, *BLOCK, platform=PLATFORMS["cpu"], env={})
        unregister_backend("ACME")
