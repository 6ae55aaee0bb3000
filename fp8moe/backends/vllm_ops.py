"""vLLM's compiled operators, loaded from their files: vLLM itself is not imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fp8moe.libraries import VLLM_OPS, Surroundings, vllm_operators
from fp8moe.registry import BackendUnavailable

REMEDY = f"install the vllm that is built for torch {torch.__version__}, or name a folder with its files in {VLLM_OPS}"
RELEASE = "vllm 0.25.1"
ARGUMENTS = {
    "cutlass_moe_mm": "out_tensors a_tensors b_tensors a_scales b_scales expert_offsets problem_sizes a_strides "
    "b_strides c_strides per_act_token per_out_ch",
    "get_cutlass_batched_moe_mm_data": "expert_offsets problem_sizes1 problem_sizes2 expert_num_tokens "
    "num_local_experts padded_m n k",
    "get_cutlass_moe_mm_problem_sizes_from_expert_offsets": "expert_first_token_offset problem_sizes1 problem_sizes2 "
    "n k swap_ab",
    "moe_align_block_size": "topk_ids num_experts block_size sorted_token_ids experts_ids num_tokens_post_pad "
    "maybe_expert_map",
    "moe_wna16_marlin_gemm": "a c_or_none b_q_weight b_bias_or_none b_scales a_scales global_scale b_zeros_or_none "
    "g_idx_or_none perm_or_none workspace sorted_token_ids expert_ids num_tokens_past_padded topk_weights "
    "moe_block_size top_k mul_topk_weights b_type_id size_m size_n size_k is_full_k use_atomic_add use_fp32_reduce "
    "is_zp_float thread_k thread_n blocks_per_sm",
}
"""Of each operator that an adapter calls, by position, those of `RELEASE`, in order. Other releases have operators of
the same name with others: 0.33's Marlin has three fewer."""


def operators(user: str, needed: Mapping[str, Sequence[str]]) -> Any:
    """Operators by name.

    Args:
        user: who asks, for errors.
        needed: by extension, "_C" or "_moe_C", the names of its operators. A process that has imported vLLM has them
            already, and nothing is loaded twice.

    Raises:
        BackendUnavailable: the files are not there, do not load, lack an operator, or have one with other arguments.
    """
    for extension, names in needed.items():
        if not all(hasattr(getattr(torch.ops, extension), name) for name in names):
            _load(user, extension)
    found: dict[str, Any] = {}
    for extension, names in needed.items():
        namespace = getattr(torch.ops, extension)
        missing = [name for name in names if not hasattr(namespace, name)]
        if missing:
            raise BackendUnavailable(
                f"{user}: vLLM's {extension} has no {', '.join(missing)}: another version or device; {REMEDY}"
            )
        found |= {name: getattr(namespace, name) for name in names}
    other = "; ".join(filter(None, (_other_arguments(name, operator) for name, operator in found.items())))
    if other:
        version = None if os.environ.get(VLLM_OPS) else Surroundings().version("vllm")
        other += f" (vllm {version} is installed)" if version else ""
        remedy = f"install {RELEASE}, or name a folder with its files in {VLLM_OPS}"
        raise BackendUnavailable(f"{user}: {other}: another version; {remedy}")
    return SimpleNamespace(**found)


def _other_arguments(name: str, operator: Any) -> str:
    """In what an operator is not that of `RELEASE`; "" where it is, or is none of `ARGUMENTS`."""
    known = ARGUMENTS.get(name, "").split()
    found = [argument.name for argument in operator.default._schema.arguments]
    if not known or found == known:
        return ""
    missing = [argument for argument in known if argument not in found]
    added = [argument for argument in found if argument not in known]
    parts = [f"{word} {', '.join(names)}" for word, names in (("without", missing), ("with", added)) if names]
    return f"vLLM's {name} takes {len(found)} arguments, {' and '.join(parts) or 'in another order'}"


def _load(user: str, extension: str) -> None:
    try:
        path = vllm_operators()[extension]
        load: Callable[[str], None] = torch.ops.load_library
        load(str(path))
    except FileNotFoundError as error:
        raise BackendUnavailable(f"{user}: {error}; {REMEDY}") from None
    except (OSError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(f"{user}: {path} does not load ({told}); {REMEDY}") from error
