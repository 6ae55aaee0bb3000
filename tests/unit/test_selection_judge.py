"""The checks of the selector convict selectors that are broken on purpose, and acquit the honest one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from conformance.selection.ask import FLASHINFER, SM89
from conformance.selection.grid import MAIN, Product, thin
from conformance.selection.judge import NAMES, GridReport, judge
from conformance.selection.removal import NAME as REMOVAL
from fp8moe import Fp8MoeBackend, Reason, explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.registry import default_backends

SMALL: tuple[Product, ...] = thin(MAIN)
FEW = 1_000
CLASSES = {spec.backend: spec.experts_cls for spec in default_backends()}
Select = Callable[..., Any]


def broken(select: Select = select_fp8_moe_backend, explain: Select = explain_fp8_moe_backend) -> dict[str, Any]:
    report = judge(select, explain, products=SMALL, explained=FEW, processes=0)
    return {name: violation for name, violation in report.violations.items() if violation is not None}


def changed(change: Callable[[Any, dict[str, Any]], Any]) -> Select:
    """The selector with its answer changed; ``change`` also gets the call's keywords and its configuration."""

    def select(config: Any, *arguments: Any, **keywords: Any) -> Any:
        answer = select_fp8_moe_backend(config, *arguments, **keywords)
        return change(answer, keywords | {"config": config})

    return select


def without_class(answer: Any, call: dict[str, Any]) -> Any:
    return (answer[0], None) if answer[0] is Fp8MoeBackend.MARLIN else answer


def by_name(answer: Any, call: dict[str, Any]) -> Any:
    return answer[0].value, answer[1]


def not_triton(answer: Any, call: dict[str, Any]) -> Any:
    return (Fp8MoeBackend.MARLIN, CLASSES[Fp8MoeBackend.MARLIN]) if call["config"].is_lora_enabled else answer


def ignores_disabling(*arguments: Any, env: Any, **keywords: Any) -> Any:
    env = {name: text for name, text in env.items() if (name, text) != (FLASHINFER, "0")}
    return select_fp8_moe_backend(*arguments, env=env, **keywords)


def falls_through(*arguments: Any, env: Any, **keywords: Any) -> Any:
    try:
        return select_fp8_moe_backend(*arguments, env=env, **keywords)
    except ValueError:
        return select_fp8_moe_backend(*arguments, env={}, **keywords)


def never_raises(*arguments: Any, **keywords: Any) -> Any:
    try:
        return select_fp8_moe_backend(*arguments, **keywords)
    except NotImplementedError:
        return Fp8MoeBackend.NONE, None


def raises_everywhere(*arguments: Any, **keywords: Any) -> Any:
    answer = select_fp8_moe_backend(*arguments, **keywords)
    if answer[0] is Fp8MoeBackend.NONE:
        raise NotImplementedError("nothing fits")
    return answer


def wrong_exception(*arguments: Any, **keywords: Any) -> Any:
    try:
        return select_fp8_moe_backend(*arguments, **keywords)
    except NotImplementedError as error:
        raise RuntimeError(str(error)) from error


def hides_the_reason(*arguments: Any, **keywords: Any) -> Any:
    try:
        return select_fp8_moe_backend(*arguments, **keywords)
    except ValueError as error:
        if getattr(error, "reason", None) is not None:
            error.reason = Reason.FORMAT  # type: ignore[attr-defined]
        raise


def last_supported(*arguments: Any, **keywords: Any) -> Any:
    backends = list(reversed(keywords.pop("backends", None) or default_backends()))
    return select_fp8_moe_backend(*arguments, backends=backends, **keywords)


def needs_all_candidates(*arguments: Any, backends: Any = None, **keywords: Any) -> Any:
    if backends is not None and len(backends) < 2:
        return Fp8MoeBackend.NONE, None
    return select_fp8_moe_backend(*arguments, backends=backends, **keywords)


def unsupported(*arguments: Any, platform: Any, **keywords: Any) -> Any:
    """Sees an older device than the one that is there."""
    on = SM89 if platform.kind == "cuda" else platform
    return select_fp8_moe_backend(*arguments, platform=on, **keywords)


def fickle() -> Select:
    calls = count()

    def select(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) % 1000 == 500:
            return Fp8MoeBackend.TRITON, CLASSES[Fp8MoeBackend.TRITON]
        return select_fp8_moe_backend(*arguments, **keywords)

    return select


def parses_eagerly(config: Any, *arguments: Any, env: Any, **keywords: Any) -> Any:
    if not config.is_lora_enabled:
        select_fp8_moe_backend(config, None, None, platform=SM89, env={k: v for k, v in env.items() if "GEMM" in k})
    return select_fp8_moe_backend(config, *arguments, env=env, **keywords)


CONVICTED_BY: dict[str, tuple[Select, set[str]]] = {
    "a class is missing": (changed(without_class), {"class_is_none_only_for_trtllm_and_none"}),
    "a name instead of a member": (changed(by_name), {"total"}),
    "LoRA is ignored": (changed(not_triton), {"lora_means_triton"}),
    "a variable does not disable": (ignores_disabling, {"disabled_never_chosen", "first_supported_in_order"}),
    "a must-use falls through": (falls_through, {"must_use_is_honoured_or_raises"}),
    "NONE on CUDA": (never_raises, {"raises_on_cuda_and_rocm_when_nothing_fits", "none_elsewhere"}),
    "an error on the CPU": (raises_everywhere, {"none_elsewhere"}),
    "another exception": (wrong_exception, {"total", "raises_on_cuda_and_rocm_when_nothing_fits"}),
    "a wrong reason": (hides_the_reason, {"agrees_with_model"}),
    "the last supported": (last_supported, {"first_supported_in_order"}),
    "the choice depends on the others": (needs_all_candidates, {REMOVAL}),
    "another device": (unsupported, {"agrees_with_model", "first_supported_in_order"}),
    "now and then TRITON": (fickle(), {"deterministic", "selected_is_supported"}),
    "eager parsing": (parses_eagerly, {"malformed_variable_is_named_where_it_is_read"}),
}
WIDE = {"NONE on CUDA", "an error on the CPU", "another exception", "eager parsing", "another device", "a wrong reason"}
"""Mutants that the small grid, mostly SM90, does not show in full."""
MORE = (
    Product.over("every device", device="*", scheme=("block", "none_128"), VLLM_USE_DEEP_GEMM=("unset", "1", "1.0")),
    Product.over("malformed", VLLM_USE_FLASHINFER_MOE_FP8="*", VLLM_USE_DEEP_GEMM="*", VLLM_MOE_USE_DEEP_GEMM="*"),
)


@pytest.mark.parametrize("mutant", CONVICTED_BY)
def test_a_broken_selector_is_convicted_by_name(mutant: str) -> None:
    select, by = CONVICTED_BY[mutant]
    report = judge(select, products=MORE if mutant in WIDE else SMALL, explained=FEW, processes=0)
    named = {name for name, violation in report.violations.items() if violation is not None}
    assert by <= named
    for name in named:
        violation = report.violations[name]
        assert violation is not None
        assert name in str(violation)
        assert "sel1:" in violation.reproduction


def test_an_explanation_without_the_unconsulted_is_convicted() -> None:
    class Shortened:
        def __init__(self, selection: Any) -> None:
            self.backend, self.experts_cls = selection.backend, selection.experts_cls
            self.error, self.rule = selection.error, selection.rule
            self.verdicts = tuple(verdict for verdict in selection.verdicts if verdict.consulted)

    found = broken(explain=lambda *arguments, **keywords: Shortened(explain_fp8_moe_backend(*arguments, **keywords)))
    assert set(found) == {"reasons_agree_with_model"}


def test_an_explanation_that_raises_is_convicted() -> None:
    def explain(*arguments: Any, **keywords: Any) -> Any:
        selection = explain_fp8_moe_backend(*arguments, **keywords)
        if selection.error is not None:
            raise selection.error
        return selection

    assert set(broken(explain=explain)) == {"reasons_agree_with_model", "every_permitted_triple_occurs"}


def test_a_reason_that_never_occurs_is_missed() -> None:
    def explain(config: Any, *arguments: Any, **keywords: Any) -> Any:
        return explain_fp8_moe_backend(config, *arguments, **keywords | {"env": {}})

    assert "every_permitted_triple_occurs" in broken(explain=explain)


def test_the_simplest_cell_is_shown() -> None:
    violation = broken(changed(not_triton))["lora_means_triton"]
    assert violation.cell == "sel1:lora=yes"
    assert (violation.expected, violation.got) == ("TRITON", "MARLIN")


def test_the_honest_selector_is_acquitted_in_processes_too() -> None:
    lines: list[str] = []
    report = judge(products=SMALL, processes=2, progress=lines.append)
    assert isinstance(report, GridReport)
    assert report.passed, str(report)
    assert tuple(report.violations) == NAMES
    assert report.cells == sum(product.size for product in SMALL) > 1_000
    assert lines[0].endswith("cells selected")


def test_main_products_have_names_of_their_own() -> None:
    assert len({product.name for product in MAIN}) == len(MAIN)
