"""Faults of arithmetic in our own kernels: a piece of a kernel's source is replaced, as a mutation would do it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from conformance.zoo.plant import ExpertsClass, Fault

KERNELS = "fp8moe.kernels"


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new`, at every of the `times` places where it occurs."""

    old: str
    new: str
    times: int = 1


class StaleMutation(ValueError):
    """The text that a mutation replaces is not in the kernel's source as often as the mutation says."""


@cache
def mutated(kernel: str, name: str, edits: tuple[Edit, ...]) -> ModuleType:
    """The module `fp8moe.kernels.{kernel}` with its source edited; made once in a process.

    Triton reads a kernel's source from its file, so the module has a file of its own, which lives as long as the
    process does.

    Raises:
        StaleMutation: an edit's text does not occur exactly as many times as it says.
    """
    module = f"{KERNELS}.{kernel}"
    source = _source(module)
    for edit in edits:
        found = source.count(edit.old)
        if found != edit.times:
            raise StaleMutation(f"mutation {name}: {edit.old!r} occurs {found} times in {module}, not {edit.times}")
        source = source.replace(edit.old, edit.new)
    mutant = f"{kernel}_mutant_{name}"
    path = Path(_folder().name, f"{mutant}.py")
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(mutant, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[mutant] = made  # where `inspect` looks for the module of a function whose source it reads
    spec.loader.exec_module(made)
    return made


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fp8moe-mutants-")


@contextmanager
def _in_place_of(kernel: str, mutant: ModuleType) -> Iterator[None]:
    """Whoever imports the kernel's module meanwhile gets the mutant: the stage stays the backend's own, whatever it
    comes to be, and only the replaced text differs."""
    package, module = importlib.import_module(KERNELS), importlib.import_module(f"{KERNELS}.{kernel}")
    sys.modules[module.__name__] = mutant
    setattr(package, kernel, mutant)
    try:
        yield
    finally:
        sys.modules[module.__name__] = module
        setattr(package, kernel, module)


def _kernel(
    stage: str, kernel: str, name: str, edits: tuple[Edit, ...], only: str
) -> Callable[[ExpertsClass], dict[str, Any]]:
    """The mutant's stage runs a kernel whose source is edited; with `only`, where that is its first argument."""

    def members(base: ExpertsClass) -> dict[str, Any]:
        right = getattr(base, stage)

        def wrong(self: Any, *args: Any) -> Any:
            if only and args[0] != only:
                return right(self, *args)
            with _in_place_of(kernel, mutated(kernel, name, edits)):
                return right(self, *args)

        return {stage: wrong}

    return members


EDITED: dict[str, tuple[str, tuple[Edit, ...]]] = {}
"""By a fault's name, the kernel's module and what is edited there."""


def kernel_fault(name: str, does: str, stage: str, kernel: str, *edits: Edit, only: str = "") -> Fault:
    EDITED[name] = kernel, edits
    return Fault(name, "", does, True, _kernel(stage, kernel, name, edits, only))


_SCALE = Edit("tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))", "amax * 0.002232142857142857")
_FLUSHED = """
@triton.jit
def scaled_to_e4m3(x, scale, HAS_CAST: tl.constexpr):
    code = unflushed(x, scale, HAS_CAST)
    return tl.where((code & 0x78) == 0, code & 0x80, code)
"""

MUTATED = (
    kernel_fault(
        "promoted_every_64",
        "the matrix unit's sum is promoted every 64 of K instead of every 128",
        "gemm",
        "grouped_gemm",
        Edit('BLOCK_K=WIDE_BLOCK if scales == "none" else BLOCK,', "BLOCK_K=WIDE_BLOCK,"),
        # Scales still change every 128 of K.
        Edit("a_scale_block += stride_a_scale_k", "a_scale_block += stride_a_scale_k * ((start // BLOCK_K) % 2)"),
        Edit("w_scale_block += stride_w_scale_k", "w_scale_block += stride_w_scale_k * ((start // BLOCK_K) % 2)"),
    ),
    kernel_fault(
        "never_promoted",
        "with scales by row, one sum over all of K in the matrix unit: what Triton makes of `total += tl.dot(x, y)`",
        "gemm",
        "grouped_gemm",
        Edit("total = tl.fma(tl.dot(x, y), ones, total)", "total = tl.dot(x, y, total)"),
    ),
    kernel_fault(
        "accumulator_of_14_bits",
        "the running sum over K keeps 14 bits, as Hopper's FP8 unit does when nothing is promoted",
        "gemm",
        "grouped_gemm",
        Edit(
            "        a_block += a_step\n",
            "        kept = total.to(tl.int32, bitcast=True) & -1024\n"
            "        total = kept.to(tl.float32, bitcast=True)\n"
            "        a_block += a_step\n",
        ),
    ),
    kernel_fault(
        "weight_scale_first",
        "a sum meets the weight's scale before the activation's",
        "gemm",
        "grouped_gemm",
        Edit("product = tl.dot(x, y) * x_scale[:, None]", "product = tl.dot(x, y) * y_scale"),
        Edit("tl.fma(product, ones * y_scale, total)", "tl.fma(product, ones * x_scale[:, None], total)"),
        Edit(
            "total = (total * x_scale[:, None]) * tl.load(at, mask=in_range, other=0.0)[None, :]",
            "total = (total * tl.load(at, mask=in_range, other=0.0)[None, :]) * x_scale[:, None]",
        ),
    ),
    kernel_fault(
        "product_rounded",
        "with block scales, a product is rounded before it is added: no fma",
        "gemm",
        "grouped_gemm",
        Edit("tl.fma(product, ones * y_scale, total)", "product * y_scale + total"),
    ),
    kernel_fault(
        "exponential_of_the_device",
        "the activation takes the device's own exponential",
        "activation",
        "activation",
        Edit("finite = p * low * high", "finite = tl.exp(x)"),
        Edit("finite = (p + p) * factor", "finite = tl.exp(x)"),
    ),
    kernel_fault(
        "exponential_one_degree_short",
        "the exponential's polynomial lacks its last term, of 2.5e-6 at most",
        "activation",
        "activation",
        Edit("tl.fma(ones * 0.0013814598787575960, r, ones * 0.008368717506527901)", "ones * 0.008368717506527901"),
    ),
    kernel_fault(
        "silu_by_reciprocal",
        "silu multiplies by the reciprocal of its divisor instead of dividing",
        "activation",
        "activation",
        Edit(
            "tl.div_rn(x, one_and_exponential(-x))",
            "x * tl.div_rn(tl.full(x.shape, 1.0, tl.float32), one_and_exponential(-x))",
        ),
    ),
    kernel_fault(
        "silu_by_approximate_division",
        "silu divides with `/`, which on NVIDIA's devices may be 2 ulps off",
        "activation",
        "activation",
        Edit("tl.div_rn(x, one_and_exponential(-x))", "x / one_and_exponential(-x)"),
    ),
    kernel_fault(
        "scale_by_reciprocal",
        "a dynamic scale is the amax times fp32(1/448) instead of a division by 448",
        "quantize",
        "quantize",
        _SCALE,
    ),
    kernel_fault(
        "second_scale_by_reciprocal",
        "as scale_by_reciprocal, for the second GEMM's input alone",
        "quantize",
        "quantize",
        _SCALE,
        only="a2",
    ),
    kernel_fault(
        "subnormal_codes_flushed",
        "FP8's subnormal numbers become 0 where the intermediate is quantised",
        "quantize",
        "quantize",
        Edit("import has_cast, scaled_to_e4m3", f"import has_cast, scaled_to_e4m3 as unflushed\n{_FLUSHED}"),
        only="a2",
    ),
)
"""Faults of the stages that both formats share."""

MUTATED_COMBINE = kernel_fault(
    "weighted_product_rounded",
    "a result times its routing weight is rounded before it is added: no fma",
    "combine",
    "reduce",
    Edit("added = tl.fma(value, ones * tl.load(at), total)", "added = total + value * tl.load(at)"),
)
"""TRITON's alone: the batched format is combined in torch."""
