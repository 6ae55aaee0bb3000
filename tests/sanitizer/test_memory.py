"""Every kernel's memory, without a GPU: no access out of bounds, no race between programs.

ttsem runs the IR that Triton compiles a launch to, with the real block sizes, and checks each access against the
tensor's own storage. It has a process of its own, `tox run -e sanitizer`: it takes the place of Triton's driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

if os.environ.get("FP8MOE_TTSEM") != "1":
    pytest.skip("ttsem runs in a process of its own: tox run -e sanitizer", allow_module_level=True)

import triton
import triton.language as tl
from ttsem import sanitize  # before whatever imports triton

from fp8moe.kernels.activation import activate
from fp8moe.kernels.align import align_pairs, most_tiles
from fp8moe.kernels.begin import begin
from fp8moe.kernels.few import place_few_pairs
from fp8moe.kernels.fused import activate_quantize, quantize_to_places
from fp8moe.kernels.fused_rows import activate_quantize_rows, quantize_rows_to_places
from fp8moe.kernels.grouped_gemm import BLOCK, grouped_gemm
from fp8moe.kernels.merge import merge_slots
from fp8moe.kernels.places import place_pairs
from fp8moe.kernels.quantize import (
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_group,
    tensor_scale,
)
from fp8moe.kernels.reduce import weighted_sum
from fp8moe.kernels.settle import settle_pairs

TILE_ROWS = 16


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """Nothing is left unchecked in silence."""
    torch.set_num_threads(1)
    with sanitize.session(cuda_is_cpu=False) as state:
        yield
    assert state.launches
    assert not state.races_unchecked


def rows(count: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """In a storage of its own that is no larger: what lies past its end belongs to nobody."""
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def present(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32) % 3 - 1


def gemm(scales: str, part: int, k: int) -> None:
    """Two experts, two parts of W's rows, pairs without an expert among them."""
    experts, tokens, parts = 2, 9, 2
    blocks, dtype = -(-k // BLOCK), torch.bfloat16 if scales == "none" else torch.float8_e4m3fn
    a_scale = {"block": (tokens, blocks), "row": (tokens, 1)}.get(scales)
    w_scale = {"block": (experts, parts * -(-part // BLOCK), blocks), "row": (experts, part * parts)}.get(scales)
    ids = torch.tensor([[0, 1]] * (tokens - 1) + [[1, -1]])
    grouped_gemm(
        rows(tokens, k).to(dtype),
        None if a_scale is None else torch.ones(a_scale),
        torch.stack([rows(part * parts, k)] * experts).to(dtype),
        None if w_scale is None else torch.ones(w_scale),
        align_pairs(ids, experts, TILE_ROWS),
        pairs_per_row=2,
        parts=parts,
        scales=scales,  # type: ignore[arg-type]
        bias=rows(experts, part * parts),
    )


def summed(columns: int) -> None:
    ids = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    weighted_sum(rows(6, columns, torch.float32), ids, torch.empty(3, columns, dtype=torch.bfloat16), torch.rand(3, 2))


def placed(tokens: int, alignment: int) -> None:
    ids = torch.arange(tokens * 2).reshape(tokens, 2) % 21 - 1
    place_pairs(ids, 19, tokens * 2 + 19 * alignment, alignment, rows_of_owner=1, places=True, pair_of_row=True)


def few_placed(tokens: int, tile_rows: int) -> None:
    ids, weights = torch.arange(tokens * 3).reshape(tokens, 3) % 21 - 1, torch.rand(tokens, 3)
    place_few_pairs(ids, 19, most_tiles(ids.numel(), 19, tile_rows), tile_rows, pad=ids.numel(), weights=weights)


def begun(tokens: int, columns: int) -> None:
    ids = torch.arange(tokens * 3).reshape(tokens, 3) % 21 - 1
    begin(rows(tokens, columns), ids, 19, most_tiles(ids.numel(), 19, 16), 16)


def quantized_to_places(tokens: int, columns: int) -> None:
    codes, scales = (
        torch.empty(tokens * 2, columns, dtype=torch.float8_e4m3fn),
        torch.empty(tokens * 2, -(-columns // 128)),
    )
    quantize_to_places(rows(tokens, columns), torch.arange(tokens * 2, dtype=torch.int32).flip(0) - 3, codes, scales)


def activated_in_places(count: int, columns: int) -> None:
    codes, scales = torch.empty(count, columns, dtype=torch.float8_e4m3fn), torch.empty(count, -(-columns // 128))
    activate_quantize(
        rows(count, 2 * columns), "silu", torch.arange(count, dtype=torch.int32).flip(0) - 3, codes, scales
    )


def activated_in_order(count: int, columns: int) -> None:
    codes, scales = torch.empty(count, columns, dtype=torch.float8_e4m3fn), torch.empty(count, -(-columns // 128))
    activate_quantize(rows(count, 2 * columns), "silu", present(count), codes, scales, in_order=True)


def quantized_rows(tokens: int, columns: int) -> None:
    codes, scales = torch.empty(tokens * 2, columns, dtype=torch.float8_e4m3fn), torch.empty(tokens * 2)
    quantize_rows_to_places(
        rows(tokens, columns), torch.arange(tokens * 2, dtype=torch.int32).flip(0) - 3, codes, scales
    )


def activated_rows(count: int, columns: int) -> None:
    codes, scales, places = torch.empty(count, columns).to(torch.float8_e4m3fn), torch.empty(count), present(count)
    places = torch.where(places >= 0, torch.arange(count, dtype=torch.int32), -1)
    activate_quantize_rows(rows(count, 2 * columns), "silu", places, codes, scales, torch.ones(1))


def settled(tokens: int, top_k: int) -> None:
    ids = torch.arange(tokens * top_k).reshape(tokens, top_k) % 7 - 2
    settle_pairs(ids, torch.rand(tokens, top_k), torch.arange(5) - 1, 4)


def merged(tokens: int, top_k: int) -> None:
    ids = torch.arange(tokens * top_k).reshape(tokens, top_k) % 7 - 2
    merge_slots(ids, torch.rand(tokens, top_k), torch.arange(5) - 1, 4)


# Sizes that fill tiles and sizes that do not; several programs each.
CALLS: dict[str, Callable[[], object]] = {
    "groups-17x200": partial(quantize_per_token_group, rows(17, 200)),
    "groups-32x256": partial(quantize_per_token_group, rows(32, 256)),
    "groups-1x1": partial(quantize_per_token_group, rows(1, 1)),
    "groups-present": partial(quantize_per_token_group, rows(37, 200), present=present(37)),
    "groups-strided": partial(quantize_per_token_group, rows(400, 17).t()[:, ::2]),
    "tokens-5x1100": partial(quantize_per_token, rows(5, 1100)),
    "tokens-4x1024": partial(quantize_per_token, rows(4, 1024)),
    "tokens-present": partial(quantize_per_token, rows(37, 200), present=present(37)),
    "tensor-5x1100": partial(quantize_per_tensor, rows(5, 1100), torch.ones(1)),
    "tensor-8x2048": partial(quantize_per_tensor, rows(8, 2048), torch.ones(1)),
    "tensor-present": partial(quantize_per_tensor, rows(5, 1100), torch.ones(5), present=present(5)),
    "amax-5x1100": partial(tensor_scale, rows(5, 1100)),
    "silu-17x264": partial(activate, rows(17, 2 * 264, torch.float32), "silu"),
    "relu2-33x300": partial(activate, rows(33, 300, torch.float32), "relu2_no_mul", dtype=torch.bfloat16),
    "relu2-present": partial(activate, rows(37, 300, torch.float32), "relu2_no_mul", present=present(37)),
    **{
        f"gemm-{scales}-{part}x{k}": partial(gemm, scales, part, k)
        for scales in ("block", "row", "none")
        for part, k in ((144, 200), (128, 256))
    },
    "sum-1100": partial(summed, 1100),
    "sum-1024": partial(summed, 1024),
    "settled-37x3": partial(settled, 37, 3),
    "merged-130x3": partial(merged, 130, 3),
    "merged-17x10": partial(merged, 17, 10),
    "places-40": partial(placed, 40, 16),
    "places-600": partial(placed, 600, 1),
    "few-1x3": partial(few_placed, 1, 48),
    "begin-1x3": partial(begun, 1, 128),
    "begin-40x3": partial(begun, 40, 200),
    "few-40x3": partial(few_placed, 40, 16),
    "to-places-17x200": partial(quantized_to_places, 17, 200),
    "to-places-16x256": partial(quantized_to_places, 16, 256),
    "activated-37x200": partial(activated_in_places, 37, 200),
    "activated-32x128": partial(activated_in_places, 32, 128),
    "activated-in-order-37x200": partial(activated_in_order, 37, 200),
    "rows-to-places-5x1100": partial(quantized_rows, 5, 1100),
    "rows-to-places-4x1024": partial(quantized_rows, 4, 1024),
    "activated-rows-5x1100": partial(activated_rows, 5, 1100),
}


@pytest.mark.parametrize("name", CALLS)
def test_programs_keep_to_their_tensors_and_to_themselves(name: str) -> None:
    CALLS[name]()


@triton.jit
def copy_kernel(x, y, n, PAST: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < n + PAST
    tl.store(y + at, tl.load(x + at, mask=mask, other=0.0) + tl.program_id(0), mask=mask)


@pytest.mark.parametrize(
    ("past", "step", "kind"),
    [(1, 64, "oob_read"), (64, 64, "oob_read"), (0, 60, "race"), (0, 64, "")],
    ids=["one-past", "no-mask", "overlap", "right"],
)
def test_planted_faults_are_seen(past: int, step: int, kind: str) -> None:
    """ttsem is young, and runs here on versions that its author does not test: this says that it still sees."""
    x, y = torch.ones(200), torch.empty(200)

    def call() -> None:
        copy_kernel[(4,)](x, y, 200, PAST=past, STEP=step, BLOCK=64, enable_fp_fusion=False)

    if not kind:
        call()
        return
    with pytest.raises(sanitize.KernelFault) as caught:
        call()
    assert caught.value.fault.kind == kind
