"""One backend on one case: what every check asks of it, with the backend's own failures told from the suite's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from conformance.bits import difference, digest, why_not_bits
from conformance.bounds import Judgement, judge
from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.compared import Call, LastCompared
from conformance.interpreted import Interpreted
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.mismatches import in_bits, told_judgement, worst_of
from conformance.oracles import tensors_of, trace_of
from conformance.plan import SIMULATED_PLATFORM, Subject, Target, is_simulated
from conformance.raised import told
from conformance.result_form import form_of_result
from conformance.results import Evidence, Mismatch, Status
from conformance.untouched import Watch
from fp8moe.config import FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.recipe import Arithmetic, Contract, Steps
from fp8moe.reference.closed import OracleClosed, oracles_closed
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.texts import text_of


class Ended(Exception):
    """A verdict that was come to on the way; the only way in which a check convicts.

    Args:
        status: of the result.
        reason: why.
        judgement: by the bound, where that is what convicts.
        mismatch: where it shows most, in the case's own tokens.
    """

    def __init__(
        self, status: Status, reason: str, judgement: Judgement | None = None, mismatch: Mismatch | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.judgement = judgement
        self.mismatch = mismatch


class Trial:
    """A backend made with a case's weights, and its calls, guarded: what it raises is its failure, its results have
    the form that they must have, its inputs stay as they were.

    Args:
        case, subject, target: as `conformance.checks.check_case` takes them.

    Attributes:
        tensors: the case's.
        backend: made by `start`; so are `contract`, `arithmetic` and `steps`, which are read once, before anything is
            computed.
        simulated: the backend's kernels run in Triton's interpreter, as its class tells.
        interpreted: whether any kernel did.
        judged_by: how `CheckResult.judged_by` says it.
        judgement: the last one by the bound.
        digest: of the first output.
        mismatch: where it convicts, if that can be told.
        raised: what the backend raised, where that convicts.
        kept: on the CPU, outputs on the case's own tensors, where they are asked for.
        compared: the calls that were compared last, where they are asked for.
    """

    backend: FusedMoEPermuteExpertsUnpermute
    contract: Contract
    arithmetic: Arithmetic | None
    steps: Steps | None

    def __init__(self, case: Case, subject: Subject, target: Target) -> None:
        self.case = case
        self.subject = subject
        self.target = target
        self.simulated = is_simulated(subject.experts_cls, target)
        self.interpreted = Interpreted()
        self.tensors = tensors_of(case, target.device)
        self.watch = Watch(self.tensors)
        self.judged_by = ""
        self.judgement: Judgement | None = None
        self.mismatch: Mismatch | None = None
        self.raised: BaseException | None = None
        self.digest = ""
        self.kept: list[Tensor] | None = None
        self.compared = LastCompared()

    @property
    def platform(self) -> Platform:
        """That the backend's predicate is asked about."""
        return SIMULATED_PLATFORM if self.simulated else self.target.platform

    @property
    def evidence(self) -> Evidence:
        return Evidence.SIMULATED if self.simulated or self.interpreted.ran else Evidence.HARDWARE

    def start(self) -> None:
        """Makes the backend and reads its contract.

        Raises:
            Ended: it cannot be made, declares nonsense, or the case is beyond its declared limits.
        """
        declared = self.subject.experts_cls.contract
        beyond = beyond_limits(declared, self.case) if isinstance(declared, Contract) else ""
        if beyond:  # a constructor may enforce what its class declares
            raise Ended(Status.NOT_APPLICABLE, beyond)
        self.backend = self.made(self.tensors)
        self.contract = contract = contract_of(self.backend, self.case.tokens)
        pairs = int(self.tensors.topk_ids.numel())
        self.arithmetic, self.steps = arithmetic_of(contract, pairs), steps_of(contract, pairs)
        beyond = beyond_limits(contract, self.case)
        if beyond:
            raise Ended(Status.NOT_APPLICABLE, beyond)
        why = why_not_bits(self.tensors, contract)
        self.judged_by = f"{BY_BOUND}{why}" if why else BY_BITS

    @property
    def by_bits(self) -> bool:
        """The verdict on this case is equality with the replay: every token's sums are known, whatever the others'."""
        return self.judged_by == BY_BITS

    @property
    def row_by_row(self) -> bool:
        """It declares that a token's bits do not depend on the other tokens of a call of the same shape."""
        return self.by_bits or bool(self.contract.batch_invariant and self.contract.deterministic)

    def contract_for(self, tensors: CaseTensors) -> Contract:
        """What holds for a call of the backend on `tensors`, whose tokens may be another number.

        Raises:
            Ended: it declares nonsense.
        """
        return contract_of(self.backend, len(tensors.hidden_states))

    def made(self, tensors: CaseTensors) -> FusedMoEPermuteExpertsUnpermute:
        """Another backend, with these tensors' configuration and weights.

        Raises:
            Ended: its own predicate refuses the configuration, or its constructor raised.
        """
        self.compared.begin(tensors)
        refused = refusal(self.subject.experts_cls, tensors, self.platform)
        if refused:
            raise Ended(Status.NOT_SUPPORTED, refused)
        with guarded("its constructor"):
            return self.subject.experts_cls(tensors.config, tensors.quant, tensors.weights)

    def call(
        self,
        tensors: CaseTensors | None = None,
        *,
        output: Tensor | None = None,
        backend: FusedMoEPermuteExpertsUnpermute | None = None,
    ) -> Tensor:
        """One call, to its end; by default on the case's own tensors and backend.

        Raises:
            Ended: it raised, its result has another form than it must have, or an input of the case has changed.
        """
        given = self.tensors if tensors is None else tensors
        self.compared.begin(given)
        with guarded("apply"):
            result = run(self.backend if backend is None else backend, given, output)
        broken = form_of_result(result, given.hidden_states) or self.watch.changed()
        if broken:
            raise Ended(Status.FAILED, broken)
        self.compared.add(got=result)
        if not self.digest:
            self.digest = digest(result)
        if self.kept is not None and tensors is None:
            self.kept.append(result.detach().cpu().clone())
        if output is not None and result.data_ptr() != output.data_ptr():
            raise Ended(Status.FAILED, "apply did not write to the output it was given")
        return result

    def equal(
        self,
        expected: Tensor,
        got: Tensor,
        what: str,
        tokens: Tensor | None = None,
        *,
        given: CaseTensors | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Equal bits, (M, H) both, of a call whose bits the case's own tells.

        Args:
            tokens: (M,) which token of the case each row is, int64; None: its own number.
            given: to the call that `got` comes from; None: the case's own tensors.
            rows: (M,) of that call, int64; None: all.

        Raises:
            Ended: with `what`, and where they differ.
        """
        second = self.tensors if given is None else given
        self.compared.begin(second, what, got, first=self.tensors, expected=expected, rows=rows)
        self._equal(expected, got, what, tokens)

    def _equal(self, expected: Tensor, got: Tensor, what: str, tokens: Tensor | None) -> None:
        found = difference(expected, got)
        if found.differing:
            token = found.row if tokens is None else int(tokens[found.row])
            self.compared.differs(found.row)
            raise Ended(
                Status.FAILED,
                f"{what}: {found.differing} of {found.elements} elements differ, the farthest of token {token}, "
                f"column {found.column}: expected {found.expected:.9g}, got {found.got:.9g}",
                mismatch=in_bits(found, token, expected.shape[1]),
            )

    def within(
        self,
        tensors: CaseTensors,
        output: Tensor,
        what: str,
        tokens: Tensor | None = None,
        contract: Contract | None = None,
        named: Tensor | None = None,
    ) -> None:
        """An output of a call on `tensors`, which may be no case's, within the bound around the recipe's result.

        Args:
            tokens: those to judge, int64; None: all.
            contract: of the backend that was called, where its configuration is another than the case's.
            named: (M,) which token of the case each row is, int64; None: its own number.

        Raises:
            Ended: with `what`, and where it is farthest outside.
        """
        self.compared.begin(tensors, what, output)
        self._within(tensors, output, what, tokens, contract, named)

    def _within(
        self,
        tensors: CaseTensors,
        output: Tensor,
        what: str,
        tokens: Tensor | None = None,
        contract: Contract | None = None,
        named: Tensor | None = None,
    ) -> None:
        self.compared.add(rows=tokens)
        if tokens is None:
            tokens = torch.arange(len(tensors.hidden_states), device=output.device)
        # A call of another size may have another contract, and another arithmetic.
        declared = self.contract_for(tensors) if contract is None else contract
        arithmetic = arithmetic_of(declared, int(tensors.topk_ids.numel()))
        trace = trace_of(tensors, declared.recipe, tokens)
        self.compared.add(trace=trace, arithmetic=arithmetic)
        judgement = judge(trace, output[tokens].to(trace.R.device), arithmetic)
        if self.judgement is None or judgement.error_over_bound > self.judgement.error_over_bound:
            self.judgement = judgement
        if not judgement.passed:
            self.judgement = judgement
            whose = tokens if named is None else named[tokens]
            if judgement.worst is not None:
                self.compared.differs(judgement.worst.token)
            told = f"{what}: {told_judgement(judgement, whose)}"
            raise Ended(Status.FAILED, told, judgement, worst_of(judgement, whose))

    def same(
        self,
        tensors: CaseTensors,
        expected: Tensor,
        got: Tensor,
        what: str,
        *,
        exact: bool,
        origin: Call | None = None,
        before: Call | None = None,
        given: CaseTensors | None = None,
        tokens: Tensor | None = None,
        contract: Contract | None = None,
    ) -> None:
        """`got`, the output of a call on `tensors`, has the bits of `expected`; or where it need not have them (`exact`
        is False) and has not, lies within the bound around what the recipe makes of `tensors`.

        Args:
            origin: the call that `expected` comes from; where bits differ it is judged as well.
            before: the same, of a call that is not judged; with neither it is the case's own.
            given: to the call, where that is not `tensors`, of which the recipe makes the same.
            tokens: as for `equal`; `named` for `within`.
            contract: as for `within`.

        Raises:
            Ended: where it does not.
        """
        first, first_got = origin or before or (self.tensors, None)
        self.compared.begin(given or tensors, what, got, first=first, first_got=first_got, expected=expected)
        if exact:
            self._equal(expected, got, what, tokens)
        elif difference(expected, got).differing:
            self._within(tensors, got, what, contract=contract, named=tokens)
            if origin is not None:
                self.compared.add(at_first=True)
                self._within(*origin, f"before the change ({what})")


def run(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor | None = None) -> Tensor:
    """One call of `apply`, to its end."""
    result = tensors.call(backend, output)
    if tensors.hidden_states.device.type == "cuda":
        torch.cuda.synchronize()
    return result


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """The backend's own code: what it raises is the verdict on it, and the oracles are closed to it."""
    try:
        with oracles_closed():
            yield
    except LayerNotSupported as error:
        raise Ended(Status.NOT_SUPPORTED, text_of(error)) from error
    except BackendUnavailable as error:
        raise Ended(Status.NOT_RUN, text_of(error)) from error
    except OracleClosed as error:
        raise Ended(Status.FAILED, f"it asked the oracles for the answer: {text_of(error)}") from error
    except torch.OutOfMemoryError as error:
        raise Ended(Status.NOT_RUN, f"out of memory: {text_of(error)}") from error
    except (Exception, SystemExit) as error:
        raise Ended(Status.FAILED, f"{what} raised {told(error)}") from error


def contract_of(backend: FusedMoEPermuteExpertsUnpermute, tokens: int) -> Contract:
    """What a backend declares of a call of so many tokens; it may depend on its configuration.

    Raises:
        Ended: it is no contract.
    """
    with guarded("its contract"):
        contract = backend.contract
        if not isinstance(contract, Contract):
            raise TypeError(f"it is a {type(contract).__name__}: expected a fp8moe.recipe.Contract")
        return contract.for_tokens(tokens)


def arithmetic_of(contract: Contract, pairs: int) -> Arithmetic | None:
    """The declared arithmetic of a call with `pairs` token-expert pairs.

    Raises:
        Ended: it is none.
    """
    with guarded("its contract"):
        return contract.arithmetic_for(pairs)


def steps_of(contract: Contract, pairs: int) -> Steps | None:
    """The declared steps of such a call.

    Raises:
        Ended: they are none.
    """
    with guarded("its contract"):
        return contract.steps_for(pairs)


def refusal(cls: type[FusedMoEPermuteExpertsUnpermute], tensors: CaseTensors, platform: Platform) -> str:
    """Why a backend's predicate does not take this very layer; "" where it does."""
    return refused(cls, tensors.config, (tensors.quant.weight_key, tensors.quant.activation_key), platform)


def refused(
    cls: type[FusedMoEPermuteExpertsUnpermute],
    config: FusedMoEConfig,
    keys: tuple[QuantKey | None, QuantKey | None],
    platform: Platform,
) -> str:
    """As `refusal`, before there are tensors."""
    layout = cls.activation_format()
    with guarded("its predicate"):
        supported, reason = cls.is_supported_config(cls, config, *keys, layout, platform=platform, env=Env.of({}))
    return "" if supported else f"its predicate refuses this layer: {getattr(reason, 'value', reason)}"


def beyond_limits(contract: Contract, case: Case) -> str:
    """Which declared limit of the backend the case passes; "" where none."""
    held = contract.for_tokens(case.tokens)
    limits = {"top_k": (case.top_k, held.max_top_k), "experts": (case.experts, held.max_experts)}
    for name, (value, limit) in limits.items():
        if limit is not None and value > limit:
            return f"{name}={value} is beyond the declared max_{name}={limit}"
    return ""
