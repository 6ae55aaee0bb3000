"""Every kernel in every variant that a launch asks for, as data; compiles them for devices that are not here.

Triton decides when it is imported whether kernels can be compiled: not where TRITON_INTERPRET is set.
"""

from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8moe.activations import GATED, NON_GATED
from fp8moe.kernels import (
    activation,
    begin,
    few,
    fused,
    fused_rows,
    grouped_gemm,
    marks,
    merge,
    places,
    quantize,
    reduce,
    settle,
)
from fp8moe.kernels.fp8_cast import LEAST_CAPABILITY


@dataclass(frozen=True)
class Variant:
    """A kernel as one launch compiles it.

    Args:
        kernel: the @triton.jit function.
        constants: its constexpr arguments.
        pointers: the Triton types of its pointers; every other argument is an i32. A pointer that is in neither is
            None, as in the launch.
        fp8: whether it needs e4m3 in the compiler or the hardware; kernels that make codes by integer arithmetic
            do not.
        warps: of a program.
        stages: of its loads.
        shared: bytes of shared memory that a multiprocessor must have for a launch to ask for it.
    """

    kernel: Any
    constants: dict[str, Any]
    pointers: dict[str, str]
    fp8: bool = False
    warps: int = 4
    stages: int = 3
    shared: int = 0


_FLOOR = {"AMAX_FLOOR": 1e-10}
_LONG = {"ROWS": quantize.LONG_ROWS, "BLOCK": quantize.LONG_BLOCK}
_ROWS = {"x": "*bf16", "present": "*i32", "codes": "*u8", "scales": "*fp32"}


def _quantising() -> dict[str, Variant]:
    groups = {**_FLOOR, "GROUP": 128, "ROWS": quantize.ROWS}
    of_few = {**groups, "ROWS": 1}
    rows = {**_FLOOR, "ROWS": 1, "BLOCK": quantize.MOST_COLUMNS, "ONE_STEP": True}
    scalar = {"x": "*bf16", "scale": "*fp32", "present": "*i32", "codes": "*u8"}
    amax = {"x": "*bf16", "present": "*i32", "bits": "*i32"}
    present = {"HAS_PRESENT": True}
    everyone = {"HAS_PRESENT": False, "present": None}
    variants = {
        "tensor_scale": Variant(quantize.tensor_scale_kernel, _FLOOR, {"bits": "*i32", "scale": "*fp32"}),
    }
    for suffix, whom in (("", everyone), ("_present", present)):
        # The intermediate, whose rows may be absent, is fp32; hidden states are bf16 or fp16.
        x = {"x": "*fp32"} if whom is present else {}
        variants |= {
            f"quantize_group{suffix}": Variant(quantize.quantize_group_kernel, {**groups, **whom}, {**_ROWS, **x}),
            f"quantize_group_few{suffix}": Variant(
                quantize.quantize_group_kernel, {**of_few, **whom}, {**_ROWS, **x}, warps=1
            ),
            f"quantize_token{suffix}": Variant(quantize.quantize_token_kernel, {**rows, **whom}, {**_ROWS, **x}),
            f"quantize_tensor{suffix}": Variant(quantize.quantize_tensor_kernel, {**_LONG, **whom}, {**scalar, **x}),
            f"tensor_amax{suffix}": Variant(quantize.tensor_amax_kernel, {**_LONG, **whom}, {**amax, **x}),
        }
    return variants


def _gemms() -> dict[str, Variant]:
    indices = {"pairs": "*i32", "tile_experts": "*i32"}
    variants = {}
    heights = {"16": 16, "64": 64, "16_narrow": 16, "64_narrow": 64}
    for suffix, tile_rows in heights.items():
        columns = grouped_gemm.NARROW if suffix.endswith("narrow") else grouped_gemm.BLOCK
        tile = {"HAS_BIAS": True, "TILE_ROWS": tile_rows, "COLUMNS": columns, "BLOCK": grouped_gemm.BLOCK}
        for scales in ("block", "row"):
            pointers = {"a": "*fp8e4nv", "a_scale": "*fp32", "w": "*fp8e4nv", "w_scale": "*fp32", "bias": "*bf16"}
            variants[f"gemm_{scales}_{suffix}"] = Variant(
                grouped_gemm.grouped_gemm_kernel,
                {**tile, "SCALES": scales, "BLOCK_K": grouped_gemm.BLOCK},
                {**pointers, "c": "*fp32", **indices},
                fp8=True,
            )
        for dtype in ("bf16", "fp16"):
            variants[f"gemm_{dtype}_{suffix}"] = Variant(
                grouped_gemm.grouped_gemm_kernel,
                {
                    **tile,
                    "SCALES": "none",
                    "BLOCK_K": grouped_gemm.WIDE_BLOCK,
                    "a_scale": None,
                    "w_scale": None,
                },
                {"a": f"*{dtype}", "w": f"*{dtype}", "bias": f"*{dtype}", "c": "*fp32", **indices},
            )
    usual, deep = grouped_gemm.USUAL, grouped_gemm.DEEP
    for scales in ("block", "row"):
        widest = variants[f"gemm_{scales}_16"]
        constants = widest.constants | {"COLUMNS": usual.columns}
        variants[f"gemm_{scales}_16_usual"] = replace(widest, constants=constants, warps=usual.warps)
        wide = variants[f"gemm_{scales}_64"]
        variants[f"deep_gemm_{scales}_64"] = replace(wide, stages=deep.stages, shared=2 * deep.shared(64))
        variants[f"gemm_{scales}_64_short"] = replace(
            wide, constants=wide.constants | {"COLUMNS": grouped_gemm.OF_SHORT.columns}
        )
    return variants


def _placing() -> dict[str, Variant]:
    """As TRITON and as DEEPGEMM lay pairs out, and what is done around libraries' GEMMs."""
    ids = {"ids": "*i64", "expert_map": "*i32"}
    each = {"EXPERTS": places.EXPERTS, "CHUNK": places.CHUNK}
    of_few = {"HAS_MAP": True, "PADDING": few.PADDING, **few.program_of(few.FEW, 255)}
    of_fewer = {**of_few, **few.program_of(few.FEWER, 255)}
    made = ("local_ids", "counts", "totals", "before", "places", "pair_of_row", "owners", "count")
    numbers = dict.fromkeys(made, "*i32")
    by_tile = {"ROWS_OF_OWNER": 64, "ALIGNMENT": 64, "HAS_PLACES": False, "HAS_PAIR_OF_ROW": True, "places": None}
    by_row = {"ROWS_OF_OWNER": 1, "ALIGNMENT": 128, "HAS_PLACES": True, "HAS_PAIR_OF_ROW": False, "pair_of_row": None}
    wide = {"ALL_EXPERTS": 256, "HAS_BEFORE": True, "HAS_OWNERS": True}
    laid = {**numbers, "starts": "*i64"}
    group = {**_FLOOR, "GROUP": fused.GROUP, "ROWS": quantize.ROWS, "POWER_OF_TWO": False}
    laid_out = {"places": "*i32", "codes": "*u8", "scales": "*fp32"}
    row = {**_FLOOR, "ROWS": 1, "BLOCK": quantize.MOST_COLUMNS, "ONE_STEP": True, "SLOTS": 8}
    tokens = {
        "NAME": "",
        "IS_GATED": False,
        "IS_GIVEN": False,
        "IN_PLACE": False,
        "IN_ORDER": False,
        "given": None,
    }
    activated = {"NAME": "silu", "IS_GATED": True, "IS_GIVEN": True, "IN_PLACE": True, "IN_ORDER": False}
    rows = {"x": "*bf16", "given": "*fp32", **laid_out}
    to_places = Variant(fused.quantize_to_places_kernel, {**group, "SLOTS": 8}, {"x": "*bf16", **laid_out})
    activating = {**group, "NAME": "silu", "IS_GATED": True, "IN_ORDER": False}
    gate_up = {"gate_up": "*bf16", **laid_out}
    activate_quantize = Variant(fused.activate_quantize_kernel, activating, gate_up)
    activate_quantize_few = Variant(fused.activate_quantize_kernel, {**activating, "ROWS": 1}, gate_up, warps=1)
    return {
        "count_pairs": Variant(places.count_pairs_kernel, {**each, "HAS_MAP": True}, {**ids, **numbers}),
        "sum_counts": Variant(places.sum_counts_kernel, {"CHUNKS": places.CHUNKS, "EXPERTS": places.EXPERTS}, numbers),
        "place_pairs_tiles": Variant(places.place_pairs_kernel, {**each, **wide, **by_tile}, laid),
        "place_pairs_rows": Variant(places.place_pairs_kernel, {**each, **wide, **by_row}, laid),
        "place_few_pairs": Variant(
            few.place_few_pairs_kernel,
            {**of_fewer, "HAS_WEIGHTS": False, "TILE_ROWS": 16, "weights": None, "settled_weights": None},
            {**ids, **numbers},
            warps=few.WARPS,
        ),
        "place_few_pairs_weights": Variant(
            few.place_few_pairs_kernel,
            {**of_few, "HAS_WEIGHTS": True, "TILE_ROWS": 64},
            {**ids, **numbers, "weights": "*fp32", "settled_weights": "*fp32"},
            warps=few.WARPS,
        ),
        **{
            f"begin{suffix}": Variant(
                begin.begin_kernel,
                {**placing, **_FLOOR, "TILE_ROWS": 16, "GROUP": 128, "GROUPS": begin.GROUPS},
                {**ids, **numbers, **_ROWS},
                warps=few.WARPS,
            )
            for suffix, placing in (("", of_few), ("_fewer", of_fewer))
        },
        "settle_pairs": Variant(
            settle.settle_pairs_kernel,
            {"HAS_MAP": True, "ALL_EXPERTS": 256, "SLOTS": 8, "ROWS": settle.ROWS},
            {
                **ids,
                "weights": "*fp32",
                "settled_ids": "*i32",
                "settled_weights": "*fp32",
                "present": "*u8",
                "local_ids": "*i32",
                "without": "*u8",
            },
        ),
        "merge_slots": Variant(
            merge.merge_slots_kernel,
            {"HAS_MAP": True, "MERGE": True, "SLOTS": 8, "ROWS": merge.PAIRS_OF_SLOTS // 8**2},
            {**ids, "weights": "*fp32", "merged_ids": "*i32", "merged_weights": "*fp32", "without": "*u8"},
        ),
        "mark_out_of_range": Variant(
            marks.mark_out_of_range_kernel, {"BLOCK": marks.BLOCK}, {"x": "*i64", "mark": "*u8"}
        ),
        "quantize_to_places": to_places,
        "quantize_to_places_powers": _by_powers_of_two(to_places),
        "activate_quantize": activate_quantize,
        "activate_quantize_few": activate_quantize_few,
        "activate_quantize_powers": _by_powers_of_two(activate_quantize),
        "activate_quantize_in_order": Variant(
            fused.activate_quantize_kernel, {**activating, "IN_ORDER": True}, {"gate_up": "*fp32", **laid_out}
        ),
        "quantize_rows_to_places": Variant(fused_rows.quantize_rows_kernel, {**row, **tokens}, rows),
        "activate_quantize_rows": Variant(fused_rows.quantize_rows_kernel, {**row, **activated}, rows),
        "activate_quantize_rows_in_order": Variant(
            fused_rows.quantize_rows_kernel, {**row, **activated, "IN_ORDER": True}, {**rows, "x": "*fp32"}
        ),
    }


def _activations() -> dict[str, Variant]:
    return {
        f"activate_{name}": Variant(
            activation.activate_kernel,
            {
                "NAME": name,
                "IS_GATED": name in GATED,
                "HAS_PRESENT": True,
                "ROWS": activation.ROWS,
                "BLOCK": activation.BLOCK,
            },
            {"gate_up": "*fp32", "present": "*i32", "activated": "*bf16"},
        )
        for name in (*GATED, *NON_GATED)
    }


def _by_powers_of_two(variant: Variant) -> Variant:
    """The same with scales that are powers of two."""
    return replace(variant, constants=variant.constants | {"POWER_OF_TWO": True})


def _reading_bf16(variant: Variant, pointer: str) -> Variant:
    """The same on a library's results."""
    return replace(variant, pointers=variant.pointers | {pointer: "*bf16"})


_WEIGHTED_SUM = Variant(
    reduce.weighted_sum_kernel,
    {"WEIGHTED": True, "BY_ROW": False, "SLOTS": reduce.SLOTS, "BLOCK": reduce.BLOCK_BYTES // 4},
    {"y": "*fp32", "weights": "*fp32", "local_ids": "*i32", "output": "*bf16"},
)
_SUM_OF_BF16 = replace(
    _reading_bf16(_WEIGHTED_SUM, "y"), constants=_WEIGHTED_SUM.constants | {"BLOCK": reduce.BLOCK_BYTES // 2}
)

VARIANTS: dict[str, Variant] = {
    **_quantising(),
    **_gemms(),
    **_activations(),
    **_placing(),
    "activate_bf16": _reading_bf16(_activations()["activate_silu"], "gate_up"),
    "weighted_sum": _WEIGHTED_SUM,
    "weighted_sum_bf16": _SUM_OF_BF16,
    "weighted_sum_by_row": replace(_SUM_OF_BF16, constants=_SUM_OF_BF16.constants | {"BY_ROW": True}),
}

ONES = ("stride_a_k", "stride_w_k", "stride_column", "stride_output_column", "stride_weights_slot")
"""Strides that are 1 where tensors are contiguous, which a launch makes constants."""
COUNTS = (
    "rows",
    "pairs",
    "tokens",
    "given",
    "experts",
    "limit",
    "chunks",
    "rows_of_batch",
    "rows_of_scale",
    "stride_token",
    "stride_slot",
    "pairs_per_row",
    "tiles",
    "tiles_together",
    "pad",
    "placing",
    "top_k",
    "stride_a_scale_row",
    "stride_a_scale_k",
    "stride_w_scale_k",
)
"""Any numbers; the arguments in neither list are multiples of 16, as pointers and sizes usually are."""


def compile_variant(name: str, target: GPUTarget) -> Any:
    """The variant as a launch with contiguous tensors compiles it, as triton's compiled object.

    Raises:
        KeyError: there is no variant of that name. What triton raises where it cannot compile it goes through.
    """
    variant = VARIANTS[name]
    arguments = variant.kernel.arg_names
    constants = {**variant.constants, **{one: 1 for one in ONES if one in arguments}}
    if "HAS_CAST" in arguments:
        constants["HAS_CAST"] = target.backend == "cuda" and target.arch >= LEAST_CAPABILITY
    signature = {each: "constexpr" if each in constants else variant.pointers.get(each, "i32") for each in arguments}
    constexprs = {(arguments.index(each),): value for each, value in constants.items()}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, each in enumerate(arguments)
        if each not in constants and each not in COUNTS
    }
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": False}
    return triton.compile(ASTSource(variant.kernel, signature, constexprs, aligned), target=target, options=options)
