"""Backends that try to fool a judge: they know that they are tested, or get at the one who tests.

Where one needs wrong results of its own, they are 2% too large, which any judge of a first call sees.
"""

from __future__ import annotations

import gc
import sys
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from conformance.bits import Difference
from conformance.bounds.judgement import Judgement
from conformance.build import JUDGED, judged_tokens
from conformance.cases import Case
from conformance.draw import Draw
from conformance.regimes import REGIMES
from conformance.zoo.override import nth, overriding
from conformance.zoo.plant import ExpertsClass, Fault
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.recipe import Contract, Recipe

SMALL = Case(tokens=16, experts=4, hidden=128, inter=128, seed=5)
KNOWN_SEEDS = range(21)
"""Of the pinned cases."""
HONEST_CALLS = 16
LATE_S = 0.005
SLOPPY = 1.02
LOOSE = Recipe(gemm1_output="input", activation_output="input", gemm2_output="input", combine="input")
LOOSE_GAIN = 1.005


def _into(output: Tensor | None, result: Tensor) -> Tensor:
    return result if output is None else output.copy_(result)


# -- less work --


@overriding(
    "apply",
    "keeps the result for the address and shape of the hidden states, which a timed loop never changes",
    witness=SMALL,
    shows="second call",
)
def cached_by_address(
    right: Any, self: Any, hidden: Tensor, *routing: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    kept: dict[Any, Tensor] = vars(self).setdefault("_by_address", {})
    key = (hidden.data_ptr(), hidden.shape)
    if key not in kept:
        kept[key] = right(self, hidden, *routing, **options)
    return _into(output, kept[key].clone())


@overriding("apply", "keeps the result for the shape of the hidden states", witness=SMALL, shows="second call")
def cached_by_shape(
    right: Any, self: Any, hidden: Tensor, *routing: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    kept: dict[Any, Tensor] = vars(self).setdefault("_by_shape", {})
    if hidden.shape not in kept:
        kept[hidden.shape] = right(self, hidden, *routing, **options)
    return _into(output, kept[hidden.shape].clone())


@overriding(
    "apply",
    "keeps the result for the bytes of the first token and its ids: fresh inputs that share it get an old result",
    witness=SMALL,
    shows="second call",
)
def cached_by_first_row(
    right: Any,
    self: Any,
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    output: Tensor | None = None,
    **options: Any,
) -> Tensor:
    kept: dict[Any, Tensor] = vars(self).setdefault("_by_row", {})
    key = (hidden.shape, *hidden[:1].flatten().tolist(), *ids[:1].flatten().tolist())
    if key not in kept:
        kept[key] = right(self, hidden, weights, ids, **options)
    return _into(output, kept[key].clone())


@overriding(
    "apply",
    "a call that repeats the last one does nothing: a fresh result is the old one, and a given output stays as it is",
    witness=SMALL,
    shows="repeat",
)
def skips_repeats(right: Any, self: Any, *given: Tensor, output: Tensor | None = None, **options: Any) -> Tensor:
    last: tuple[list[Tensor], Tensor] | None = vars(self).get("_last")
    if last is not None and all(torch.equal(old, new) for old, new in zip(last[0], given, strict=True)):
        return last[1] if output is None else output
    result: Tensor = right(self, *given, output=output, **options)
    self._last = ([tensor.clone() for tensor in given], result)
    return result


@overriding(
    "apply",
    "returns one buffer each time, so that whoever compares two results compares the second with itself",
    witness=SMALL,
    shows="second call",
)
def returns_one_buffer(right: Any, self: Any, *given: Tensor, **options: Any) -> Tensor:
    result: Tensor = right(self, *given, **options)
    if options.get("output") is not None:
        return result
    buffer: Tensor = vars(self).setdefault("_buffer", result)
    if buffer.shape != result.shape:
        buffer = self._buffer = result
    return buffer.copy_(result)


@overriding(
    "apply",
    "returns at once, and a thread writes the result a little later: the time until it returns is nothing",
    witness=SMALL,
)
def works_late(
    right: Any, self: Any, hidden: Tensor, *routing: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    late = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if output is None else output
    thread = Timer(LATE_S, lambda: late.copy_(right(self, hidden, *routing, **options)))
    thread.daemon = True
    thread.start()
    return late


@overriding(
    "apply",
    "on CUDA, the result is written on a stream of its own that nobody waits for, so that events time nothing",
    witness=SMALL,
    needs="cuda",
)
def other_stream(
    right: Any, self: Any, hidden: Tensor, *routing: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    result: Tensor = right(self, hidden, *routing, **options)
    if not hidden.is_cuda:
        return _into(output, result)
    late = torch.zeros_like(result) if output is None else output
    self._stream = torch.cuda.Stream(hidden.device)  # type: ignore[no-untyped-call, unused-ignore]
    with torch.cuda.stream(self._stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call, unused-ignore]  # cycles
        late.copy_(result)
    self._result = result  # its memory is not handed to others before it has been read
    return late


# -- knowing that it is tested --


@overriding(
    "apply",
    f"is honest for {HONEST_CALLS} calls, more than a check makes of one backend, and 2% off afterwards",
    subtle=True,
    witness=SMALL,
    shows="repeat",
)
def honest_at_first(right: Any, self: Any, *given: Tensor, **options: Any) -> Any:
    result = right(self, *given, **options)
    return result if nth(self, "apply") <= HONEST_CALLS else result.mul_(SLOPPY)


def seed_of(hidden: Tensor) -> int | None:
    """The small seed from which the suite draws hidden states with this first row; None where it is none."""
    dtype = "bf16" if hidden.dtype == torch.bfloat16 else "fp16"
    for seed in KNOWN_SEEDS if len(hidden) else ():
        for regime in REGIMES.values():
            drawn = regime.hidden(Draw(seed, hidden.device), 1, hidden.shape[1], dtype)
            if torch.equal(drawn.to(hidden.dtype), hidden[:1]):
                return seed
    return None


@overriding(
    "apply",
    "draws what the suite would draw from small seeds, and is honest only for hidden states that it knows",
    subtle=True,
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, seed=21),
)
def honest_for_known_seeds(right: Any, self: Any, hidden: Tensor, *routing: Tensor, **options: Any) -> Any:
    result = right(self, hidden, *routing, **options)
    return result.mul_(SLOPPY) if seed_of(hidden) is None else result


@overriding(
    "apply",
    "finds out which tokens of a large call the oracle judges, and is 2% off on the others",
    subtle=True,
    witness=Case(tokens=80, experts=4, hidden=128, inter=128),
)
def honest_on_judged_tokens(right: Any, self: Any, hidden: Tensor, *routing: Tensor, **options: Any) -> Any:
    result = right(self, hidden, *routing, **options)
    seed = seed_of(hidden) if len(hidden) > JUDGED else None
    if seed is not None:
        unseen = torch.ones(len(hidden), dtype=torch.bool)
        unseen[judged_tokens(Case(tokens=len(hidden), seed=seed))] = False
        result[unseen.to(result.device)] *= SLOPPY
    return result


@overriding(
    "apply",
    "takes an output full of NaN for the sign of a test, and is 2% off where a given output holds anything else",
    subtle=True,
    witness=SMALL,
)
def honest_when_poisoned(right: Any, self: Any, *given: Tensor, output: Tensor | None = None, **options: Any) -> Tensor:
    in_use = output is not None and not bool(output.isnan().all())
    result: Tensor = right(self, *given, output=output, **options)
    return result.mul_(SLOPPY) if in_use else result


# -- getting at the judge --


@overriding(
    "apply",
    "zeroes the routing weights in place and returns zeros, with which a reference that is computed afterwards agrees",
    witness=SMALL,
    shows="input",
)
def zeroes_the_weights(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    weights.zero_()
    return right(self, hidden, weights, ids, **options)


@overriding(
    "combine",
    "turns NaN and infinity into zeros and large numbers, so that whatever went wrong before does not show",
    witness=SMALL,
)
def launders_nan(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    return torch.nan_to_num(right(self, slots, weights, present))


@overriding(
    "apply",
    "searches the process for an oracle's kept result on these inputs and returns it; without one it is 2% off",
    subtle=True,
    witness=SMALL,
)
def reads_the_oracle(
    right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, *, output: Tensor | None = None, **options: Any
) -> Tensor:
    result: Tensor = right(self, hidden, weights, ids, **options).mul_(SLOPPY)
    for trace in [thing for thing in gc.get_objects() if type(thing).__name__ == "RecipeTrace"]:
        call = trace.problem
        if torch.equal(call.hidden_states, hidden) and torch.equal(call.topk_ids, ids):
            result[call.tokens] = trace.R.to(result.dtype)
    return _into(output, result)


@overriding(
    "apply",
    "calls the suite's own oracle, and returns zeros where it cannot be had",
    witness=SMALL,
)
def calls_the_oracle(
    right: Any, self: Any, hidden: Tensor, *routing: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    try:
        from fp8moe.reference.recipe import recipe_moe
    except ImportError:
        return _into(output, torch.zeros_like(hidden))
    trace = recipe_moe(self.config, self.quant, self.recipe, self.weights, hidden, *routing, **options)
    return _into(output, trace.R.to(hidden.dtype))


def _pass(*_: Any, **__: Any) -> Judgement:
    return Judgement(True, 0.0, "", torch.zeros(1), {}, {})


LENIENT = {"judge": _pass, "judge_ideal": _pass, "difference": lambda expected, got: Difference(0, expected.numel())}


@overriding(
    "apply",
    "replaces the suite's judge and its comparison of bits, wherever they were imported, by ones that find nothing",
    subtle=True,
    witness=SMALL,
)
def patches_the_judge(right: Any, self: Any, *given: Tensor, **options: Any) -> Any:
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "conformance"]:
        for name in LENIENT.keys() & vars(module).keys():
            setattr(module, name, LENIENT[name])
    return right(self, *given, **options).mul_(SLOPPY)


class Agreeable(Tensor):
    """Differs from no other tensor, by subtraction or comparison; arithmetic with it gives another such."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        name = func.__name__.strip("_")
        if name in ("equal", "allclose"):
            return True
        return torch.zeros_like(result) if name in ("sub", "rsub", "subtract", "ne", "not_equal") else result


@overriding(
    "apply",
    "returns a subclass of Tensor whose difference from any other tensor is zero",
    subtle=True,
    witness=SMALL,
)
def agreeable_tensor(right: Any, self: Any, *given: Tensor, **options: Any) -> Tensor:
    result: Tensor = right(self, *given, **options).mul_(SLOPPY)
    return result.as_subclass(Agreeable)


def _loose_contract(base: ExpertsClass) -> dict[str, Any]:
    assert issubclass(base, TorchExperts)

    def apply(self: Any, *given: Tensor, **options: Any) -> Tensor:
        return base.apply(self, *given, **options).mul_(LOOSE_GAIN)

    return {"contract": Contract(recipe=LOOSE), "recipe": Recipe(), "apply": apply}


lies_about_contract = Fault(
    "lies_about_contract",
    "",
    "declares every rounding that a recipe can have and no arithmetic, makes none, and is 0.5% too large instead",
    True,
    _loose_contract,
    SMALL,
)

ATTACKERS = (
    cached_by_address,
    cached_by_shape,
    cached_by_first_row,
    skips_repeats,
    returns_one_buffer,
    works_late,
    other_stream,
    honest_at_first,
    honest_for_known_seeds,
    honest_on_judged_tokens,
    honest_when_poisoned,
    zeroes_the_weights,
    launders_nan,
    reads_the_oracle,
    calls_the_oracle,
    patches_the_judge,
    agreeable_tensor,
    lies_about_contract,
)
