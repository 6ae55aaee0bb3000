"""Relations of memory: where tensors lie, what buffers held before, what must not be written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from conformance.build import CaseTensors
from conformance.named_check import Check, Exactness
from conformance.relations.changed import rows
from conformance.relations.grounds import deterministic, fewer_tokens
from conformance.results import Status
from conformance.trial import Ended, Trial
from conformance.untouched import fingerprint
from fp8moe.counted import counted
from fp8moe.validation import InvalidMoEInput

GUARD = 256
"""Elements before and after a tensor that are watched, or must not be read: more than a row of a tile of 128."""
GUARD_VALUE = -77.0
POISONS = (torch.nan, torch.inf, 1e4)
NAN_BYTE = 0xFF
"""NaN in fp32, bf16, fp16 and e4m3fn, -1 as an index, -0.5 in e4m3fnuz."""
COPIES = 3
WITHOUT_VALUES = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")


def layout(trial: Trial) -> None:
    """The same numbers elsewhere: rows far apart, columns apart, ids of 32 and 64 bits, columns of wider tensors.

    Around them lies NaN, and ids of no expert. Rows far apart every backend takes (a case may have them, too); one that
    refuses apart columns or slots with an `InvalidMoEInput` that names the tensor keeps its contract. The arithmetic
    may follow the layout (a copy by other instructions, another kernel), so bits are compared where they are replayed.
    """
    tensors = trial.tensors
    output = trial.call()
    apart = replace(
        tensors,
        hidden_states=_in_wider_rows(tensors.hidden_states, torch.nan),
        topk_weights=_in_every_other_column(tensors.topk_weights, torch.nan),
        topk_ids=_in_every_other_column(tensors.topk_ids.to(torch.int64), 1 << 20),
    )
    origin = (tensors, output)
    what = "rows and slots far apart, ids of 64 bits"
    got = _unless_refused(trial, apart, None, "topk_ids", "topk_weights")
    if got is not None:
        trial.same(apart, output, got, what, exact=trial.by_bits, origin=origin)
    columns = replace(
        tensors,
        hidden_states=_in_every_other_column(tensors.hidden_states, torch.nan),
        topk_weights=tensors.topk_weights.t().contiguous().t(),
        topk_ids=tensors.topk_ids.to(torch.int32).t().contiguous().t(),
    )
    got = _unless_refused(trial, columns, None, "hidden_states", "topk_ids", "topk_weights")
    if got is not None:
        what = "columns of the hidden states apart, ids and weights slot by slot"
        trial.same(columns, output, got, what, exact=trial.by_bits, origin=origin)


def _in_wider_rows(tensor: Tensor, around: float) -> Tensor:
    wide = tensor.new_full((tensor.shape[0] + 1, tensor.shape[1] + GUARD), around)
    return wide[1:, GUARD // 2 : GUARD // 2 + tensor.shape[1]].copy_(tensor)


def _in_every_other_column(tensor: Tensor, around: float) -> Tensor:
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), around)
    return wide[:, ::2].copy_(tensor)


def _unless_refused(trial: Trial, tensors: CaseTensors, output: Tensor | None, *fields: str) -> Tensor | None:
    """The result of a call, or None where it raises an `InvalidMoEInput` that names one of these fields."""
    try:
        return trial.call(tensors, output=output)
    except Ended as ended:
        if isinstance(ended.__cause__, InvalidMoEInput) and ended.__cause__.field in fields:
            return None
        raise


def output_given(trial: Trial) -> None:
    """The output is written where it was asked for, and nothing beside it: contiguous, and with rows far apart.

    A backend that refuses apart rows with an `InvalidMoEInput` that names the output keeps its contract.
    """
    tensors = trial.tensors
    expected = trial.call()
    tokens, hidden = tensors.hidden_states.shape
    band = tensors.hidden_states.new_full((tokens * hidden + 2 * GUARD,), GUARD_VALUE)
    output = band[GUARD : GUARD + tokens * hidden].view(tokens, hidden)
    _written(trial, expected, trial.call(output=output), "into a given output")
    beside = torch.cat([band[:GUARD], band[GUARD + tokens * hidden :]])
    _untouched(beside, "before or behind the output it was given")
    wide = tensors.hidden_states.new_full((tokens + 2, hidden + 2 * GUARD), GUARD_VALUE)
    apart = wide[1:-1, GUARD:-GUARD]
    got = _unless_refused(trial, tensors, apart, "output")
    if got is not None:
        _written(trial, expected, got, "into a given output whose rows lie apart")
    beside = wide.clone()
    beside[1:-1, GUARD:-GUARD] = GUARD_VALUE
    _untouched(beside, "between the rows of the output it was given")


def _written(trial: Trial, expected: Tensor, got: Tensor, what: str) -> None:
    trial.same(trial.tensors, expected, got, what, exact=deterministic(trial))


def _untouched(beside: Tensor, where: str) -> None:
    changed = int((beside != GUARD_VALUE).sum())
    if changed:
        raise Ended(Status.FAILED, f"it wrote {counted(changed, 'element')} {where}")


def poison(trial: Trial) -> None:
    """What the output held before, and what is in memory that it gets for scratch, do not matter.

    Scratch is poisoned twice: by freeing memory full of NaN, which it may get, and by filling what torch's own
    functions for memory without values give, which it does get.
    """
    tensors = trial.tensors
    expected = trial.call()
    for value in POISONS:
        output = torch.full_like(tensors.hidden_states, value, memory_format=torch.contiguous_format)
        got = trial.call(output=output)
        trial.same(tensors, expected, got, f"into an output full of {value}", exact=deterministic(trial))
    _poison_freed_memory(tensors)
    got = trial.call()
    what = "after memory full of NaN was freed"
    trial.same(tensors, expected, got, what, exact=deterministic(trial))
    try:
        with FilledScratch():
            got = trial.call()
    except Ended as ended:
        if ended.__cause__ is None:
            raise
        return  # it raised only under the mode, which a compiler of torch's does not look through
    trial.same(tensors, expected, got, "with torch.empty giving NaN", exact=deterministic(trial))


class FilledScratch(TorchFunctionMode):
    """`torch.empty` and its like give memory full of `NAN_BYTE`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in WITHOUT_VALUES and isinstance(result, Tensor) and result.numel():
            storage = result.untyped_storage()
            torch.tensor([], dtype=torch.uint8, device=result.device).set_(storage).fill_(NAN_BYTE)
        return result


def _poison_freed_memory(tensors: CaseTensors) -> None:
    """Fills and frees blocks of the sizes that a backend's stages take, several of each, so that it gets them next."""
    pairs, inter = tensors.topk_ids.numel(), tensors.config.intermediate_size_per_partition
    tokens, hidden = tensors.hidden_states.shape
    elements = (pairs * 2 * inter, pairs * inter, pairs * hidden, tokens * hidden, pairs, tokens)
    sizes = {count * width for count in elements for width in (1, 2, 4, 8)}
    device = tensors.hidden_states.device
    held = [torch.full((size,), NAN_BYTE, dtype=torch.uint8, device=device) for size in sizes for _ in range(COPIES)]
    del held


def inputs_untouched(trial: Trial) -> None:
    """A call leaves its inputs, what lies around them, and the layer's weights as they are."""
    tensors = trial.tensors
    output = trial.call()
    bands = {
        "hidden_states": _banded(tensors.hidden_states),
        "topk_weights": _banded(tensors.topk_weights),
        "topk_ids": _banded(tensors.topk_ids),
    }
    if tensors.expert_map is not None:
        bands["expert_map"] = _banded(tensors.expert_map[None])
    before = {name: fingerprint(band) for name, (band, _) in bands.items()}
    inner = {name: view[0] if name == "expert_map" else view for name, (_, view) in bands.items()}
    given = replace(tensors, **inner)  # type: ignore[arg-type]
    trial.same(given, output, trial.call(given), "with inputs inside larger memory", exact=deterministic(trial))
    for name, (band, _) in bands.items():
        if not torch.equal(before[name], fingerprint(band)):
            raise Ended(Status.FAILED, f"it changed {name}, or what lies around it")


def _banded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A band of memory, and a contiguous copy of a tensor in its middle; around it lies what no call may read."""
    around = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    band = tensor.new_full((tensor.numel() + 2 * GUARD,), around)
    view = band[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return band, view


def no_aliasing(trial: Trial) -> None:
    """A result is the caller's: it shares no memory with weights, and later calls leave it as it is."""
    tensors = trial.tensors
    first = trial.call()
    kept = first.clone()
    storage = first.untyped_storage().data_ptr()
    named = {name: tensor for name, tensor in tensors.named().items() if tensor.numel()}
    for name, tensor in named.items():
        if first.numel() and tensor.untyped_storage().data_ptr() == storage:
            raise Ended(Status.FAILED, f"apply returned memory of its input {name}")
    order = torch.arange(trial.case.tokens, device=first.device).flip(0)
    second = trial.call(rows(tensors, order))
    if first.numel() and second.untyped_storage().data_ptr() == storage:
        raise Ended(Status.FAILED, "two calls returned the same memory, and the first result was still in use")
    trial.equal(kept, first, "a result after the next call")


MEMORY = (
    Check(
        "computes.relation.layout",
        "strides and offsets of hidden states, ids and weights, and the width of ids, do not matter",
        Exactness.BOUND,
        layout,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.output_given",
        "a given output is written, and nothing around it",
        Exactness.DETERMINISTIC,
        output_given,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.poison",
        "what the output and freed memory held before does not matter",
        Exactness.DETERMINISTIC,
        poison,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.inputs_untouched",
        "inputs and weights, and what lies around them, stay as they are",
        Exactness.DETERMINISTIC,
        inputs_untouched,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.no_aliasing",
        "a result shares no memory with weights or another result",
        Exactness.ALWAYS,
        no_aliasing,
        fewer_tokens(1),
    ),
)
