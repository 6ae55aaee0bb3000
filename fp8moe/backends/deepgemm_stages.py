"""What DEEPGEMM and BATCHED_DEEPGEMM share: the library, and quantisation and activation around its grouped GEMM."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, ClassVar

from torch import Tensor, bfloat16, float8_e4m3fn

from fp8moe.backends.libraries import LibraryBackend, loaded
from fp8moe.backends.triton_stages import device_guard, interprets
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.layouts.deepgemm import rows_fastest
from fp8moe.libraries import vllms_deep_gemm
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.schemes import BLOCK, scheme_name

MODULE = "deep_gemm"
VLLMS = "vllm.third_party.deep_gemm"
REMEDY = "install a DeepGEMM of 2.5 or newer, or a vLLM that brings one, and a CUDA toolkit with nvcc, for it compiles"
MULTIPLE = 128
"""Of both sizes: the side of a block of scales, and of the rows that SM90's kernels take at a time."""
BY_DEEPGEMM = Contract(
    Recipe(gemm1_output="input", gemm2_output="input"),
    Arithmetic.on("hopper.wgmma", promote_every=MULTIPLE),
    Steps(scale_order="product"),
    deterministic=True,
    batch_invariant=True,
    graph_capturable=True,
)
"""Its results are bf16. What lies between the GEMMs is ours, in fp32. Its tiles are of 64 rows or more, whatever the
number of rows, so the matrix instruction is always the same."""


class DeepGemmStages(LibraryBackend):
    """The stages. Scales are fp32 as the checkpoint has them, which SM90's kernels take; on SM10x they would have to be
    powers of two, and this adapter refuses.

    Raises:
        BackendUnavailable: another device or no library.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    written_from = "vllm 0.25.1"
    package = MODULE
    names: ClassVar[tuple[str, ...]]
    """Functions of the library."""

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not (platform.is_cuda and platform.cap == 90):
            told = "this adapter has DeepGEMM's fp32 scales alone, which are for CUDA SM90"
            raise BackendUnavailable(f"{name}: {told}, not {platform.architecture}")
        refusal = _refused(config, quant, weights) or self.refused_activation()
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        interprets(name)
        self.deep_gemm = self.library()

    def matrices_of_layer(self) -> dict[str, tuple[Tensor, Tensor]]:
        """w13 and w2 with their scales, as the library takes them."""
        given = self.converted_weights(self.platform())
        return {"w13": _pair(given.w13, given.w13_scale), "w2": _pair(given.w2, given.w2_scale)}

    def library(self) -> Any:
        """The module with `names`.

        Raises:
            BackendUnavailable: it does not load, or lacks one of them.
        """
        name = type(self).__name__
        _offer_vllms_copy(name)
        return loaded(MODULE, self.names, name, REMEDY)

    def quantised(self, values: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """(rows, columns) to codes and fp32 scales (rows, columns / 128); rows where `present` is negative are left
        undefined."""
        from fp8moe.kernels.quantize import quantize_per_token_group

        with device_guard(values.device):
            return quantize_per_token_group(values, amax_floor=BY_DEEPGEMM.recipe.amax_floor, present=present)

    def activated(self, gate_up: Tensor, present: Tensor) -> Tensor:
        """(rows, 2I) bf16 to (rows, I) fp32; rows where `present` is negative are left undefined."""
        return self.activated_by_triton(gate_up, present=present)


def _pair(matrix: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    assert scale is not None
    return matrix.contiguous(), scale.contiguous()


def pair_of(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Activations with their scales, (…, rows, groups), laid out so that the library copies nothing."""
    return codes, rows_fastest(scale)


def _offer_vllms_copy(name: str) -> None:
    """Makes the copy inside vLLM the module `deep_gemm` where there is none: importing it by its path there would
    import vLLM.

    Raises:
        BackendUnavailable: it is there and does not load.
    """
    if MODULE in sys.modules or importlib.util.find_spec(MODULE) is not None:
        return
    if VLLMS in sys.modules:  # its extension is loaded already
        sys.modules[MODULE] = sys.modules[VLLMS]
        return
    folder = vllms_deep_gemm()
    if folder is None:
        return
    spec = importlib.util.spec_from_file_location(
        MODULE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[MODULE]
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(
            f"{name}: {folder} does not load ({type(error).__name__}: {told}); {REMEDY}"
        ) from error


def _refused(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme != BLOCK:
        return f"{scheme_name(*scheme)}: expected {scheme_name(*BLOCK)}"
    if weights.w13.dtype != float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    if config.in_dtype != bfloat16:
        return f"hidden states of dtype {config.in_dtype}: expected torch.bfloat16, the dtype of DeepGEMM's results"
    if weights.w13_bias is not None or weights.w2_bias is not None:
        return "biases: the grouped GEMM has none"
    return ""
