"""`check_backend`, as somebody uses it who knows only the contract of a backend."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import check_backend
from conformance.cases import Case
from conformance.contain import Limits
from conformance.report import Report
from conformance.results import Status
from conformance.shrink import non_default_fields
from fp8moe import Fp8MoeBackend, FusedMoEActivationFormat, LayerNotSupported, Reason, Support
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.schemes import BLOCK

pytest.importorskip("cloudpickle", reason="classes that are local to a function travel by cloudpickle, a dev extra")

LITTLE = Support(
    device=lambda platform, env: True,
    needs="nothing",
    scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
    activations=frozenset({"silu"}),
    activation_format=FusedMoEActivationFormat.Standard,
)
"""One scheme and one activation: some seconds at level smoke."""


def checked(cls: type[TorchExperts], **options: Any) -> Report:
    return check_backend(cls, device="cpu", **options)


def test_an_honest_class_of_a_function_passes() -> None:
    class Honest(TorchExperts):
        """Sums over slots in another order than its base."""

        support = LITTLE

        def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
            return super().combine(slots.flip(1), weights.flip(1), present.flip(1))

    report = checked(Honest)
    assert report.verdict == "passed", [failure.reason for failure in report.failures]
    assert report.verdicts == {"selects": "passed", "computes": "passed", "performs": "not_run"}
    assert report.counts["passed"] > 60
    unsupported = {check.scheme for check in report.checks if check.status is Status.NOT_SUPPORTED}
    assert "channel_tok" in unsupported
    assert "block" not in unsupported
    assert 0 < report.distribution()["largest"] < 1


def test_a_mutant_of_a_function_is_convicted_and_small() -> None:
    class Mutant(TorchExperts):
        support = LITTLE

        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            result = super().apply(*args, **kwargs)
            return result.mul_(1.01)

    report = checked(Mutant)
    assert (report.verdict, report.verdicts["selects"]) == ("failed", "passed")
    for failure in report.failures:
        assert len(non_default_fields(Case.parse(failure.case))) <= 3
        assert failure.case in failure.reproduce
    equivalence = next(f for f in report.failures if f.check == "computes.equivalence")
    assert "token" in equivalence.reason
    assert any("it failed before" in check.reason for check in report.checks)


def test_a_budget_ends_a_run_and_it_goes_on() -> None:
    class Honest(TorchExperts):
        support = LITTLE

    nothing = checked(Honest, budget_s=0.0)
    assert nothing.verdict == "incomplete"
    assert any("the budget of 0 s was spent" in check.reason for check in nothing.checks)
    some = checked(Honest, budget_s=3.0)
    again = checked(Honest, resume=Report.from_json(some.to_json()))
    assert again.verdict == "passed"
    assert again.seconds > some.seconds
    whole = {(check.check, check.case) for check in again.checks if check.case}
    assert {(check.check, check.case) for check in some.checks if check.case} <= whole
    with pytest.raises(ValueError, match=r"resume: a report with level='smoke': expected 'quick'"):
        checked(Honest, level="quick", resume=some)


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("raises", "its constructor raised KeyError"),
        ("exits", "it ended the process with status 3"),
        ("hangs", "did not end within"),
        ("sets", "it changed torch's default dtype"),
    ],
)
def test_what_a_backend_does_to_its_process_is_its_own_result(does: str, words: str) -> None:
    class Rogue(TorchExperts):
        support = LITTLE

        def __init__(self, *args: Any) -> None:
            if does == "raises":
                raise KeyError("weights")
            super().__init__(*args)

        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            if does == "exits":
                os._exit(3)
            if does == "hangs":
                time.sleep(1000)
            result = super().apply(*args, **kwargs)
            if does == "sets":
                torch.set_default_dtype(torch.float64)
            return result

    before = (torch.get_default_dtype(), torch.get_num_threads())
    report = checked(Rogue, stop_at_first=True, limits=replace(Limits(), seconds=4.0))
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before
    assert report.verdict == "failed"
    assert words in report.failures[0].reason, report.failures[0].reason


def test_one_that_cannot_run_here_says_so() -> None:
    for backend in (Fp8MoeBackend.DEEPGEMM, Fp8MoeBackend.AITER):
        report = check_backend(backend, device="cpu")
        assert report.verdict == "incomplete"
        assert any(check.status is Status.NOT_SUPPORTED for check in report.checks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "full"}, "level='full': expected one of smoke, quick, certify"),
        ({"budget_s": -1}, "budget_s=-1: expected seconds, 0 or more"),
        ({"device": "quantum"}, "'quantum': expected one of"),
        ({"backend": "acme"}, "acme"),
        ({"backend": 7}, "backend=7: expected a Fp8MoeBackend"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        check_backend(**{"backend": "TorchExperts", "device": "cpu", **options})


def test_a_backend_that_is_judged_on_next_to_nothing_does_not_pass() -> None:
    class Limited(TorchExperts):
        """Three times too much for every layer with more than one expert, which it declares that it does not take."""

        support = LITTLE
        contract = replace(TorchExperts.contract, max_experts=1)

        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            result = super().apply(*args, **kwargs)
            return result if self.config.num_experts == 1 else result.mul_(3)

    report = checked(Limited)
    assert (report.verdict, report.failures) == ("incomplete", [])
    assert ("computes.relation.poison", "block") in report.unjudged


def test_a_layer_that_the_predicate_refuses_is_not_supported() -> None:
    class Aligned(TorchExperts):
        """Takes multiples of 128 and no expert parallelism, and says so where it is asked."""

        @staticmethod
        def is_supported_config(cls: Any, config: Any, *keys: Any, platform: Any = None, env: Any = None) -> Any:
            fits = keys[:2] == BLOCK and keys[2] is FusedMoEActivationFormat.Standard and config.activation == "silu"
            fits = fits and config.hidden_dim % 128 == 0 and not config.moe_parallel_config.use_ep
            return fits, None if fits else Reason.PARALLEL

        def __init__(self, config: Any, *args: Any) -> None:
            assert config.hidden_dim % 128 == 0
            assert not config.moe_parallel_config.use_ep
            super().__init__(config, *args)

    report = checked(Aligned)
    assert not report.failures, report.failures[0].reason
    refused = [check for check in report.checks if "its predicate refuses this layer" in check.reason]
    assert {Case.parse(check.case).hidden % 128 for check in refused if not Case.parse(check.case).ep} >= {16}


def test_a_layer_that_the_constructor_refuses_is_not_supported() -> None:
    class Even(TorchExperts):
        """Takes no layer with biases, which its predicate cannot know; or where told so, none at all."""

        support = LITTLE
        all_of_them = False

        def __init__(self, config: Any, quant: Any, weights: Any) -> None:
            if self.all_of_them or weights.w13_bias is not None:
                raise LayerNotSupported("Even: biases: the grouped GEMM has none")
            super().__init__(config, quant, weights)

    report = checked(Even)
    refused = [check for check in report.checks if check.status is Status.NOT_SUPPORTED and "biases" in check.reason]
    assert refused
    assert all(Case.parse(check.case).bias for check in refused)
    assert report.verdict == "passed", report.verdicts

    class Never(Even):
        all_of_them = True

    report = checked(Never)
    assert (report.verdict, report.failures) == ("incomplete", [])
    assert ("computes.equivalence", "block") in report.unjudged


def test_a_failure_stays_one_when_the_run_goes_on(tmp_path: Path) -> None:
    mark = tmp_path / "right from now on"

    class Flaky(TorchExperts):
        support = LITTLE

        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            result = super().apply(*args, **kwargs)
            return result if mark.exists() else result.mul_(1.01)

    first = checked(Flaky)
    mark.touch()
    again = checked(Flaky, resume=Report.from_json(first.to_json()))
    assert (first.verdict, again.verdict) == ("failed", "failed")
    assert {f.case for f in first.failures} == {f.case for f in again.failures}


def test_one_that_takes_only_unquantised_weights_has_a_report() -> None:
    class Plain(TorchExperts):
        support = replace(LITTLE, scheme=lambda platform, weights, activations: weights is None)

    report = checked(Plain, budget_s=1.0, level="quick")
    assert report.verdict == "incomplete"
    assert any("fnuz=True" in pair for pair in report.excluded)


def test_a_backend_of_whole_blocks_is_judged_by_every_relation() -> None:
    class Whole(TorchExperts):
        support = LITTLE

        def __init__(self, config: Any, quant: Any, weights: Any) -> None:
            if config.hidden_dim % 128 or config.intermediate_size_per_partition % 128:
                raise LayerNotSupported("Whole: expected multiples of 128")
            super().__init__(config, quant, weights)

    report = checked(Whole)
    assert (report.verdict, report.unjudged) == ("passed", [])
