"""What DEEPGEMM and BATCHED_DEEPGEMM share: the library, both of its scale recipes, and quantisation and activation
around its grouped GEMM."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, bfloat16, float8_e4m3fn, float32

from fp8moe.backends.libraries import LibraryBackend, loaded
from fp8moe.backends.triton_stages import device_guard, interprets
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.layouts.deepgemm import empty_rows_fastest
from fp8moe.libraries import vllms_deep_gemm
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.schemes import BLOCK, scheme_name

MODULE = "deep_gemm"
VLLMS = "vllm.third_party.deep_gemm"
REMEDY = "install a DeepGEMM of 2.5 or newer, or a vLLM that brings one, and a CUDA toolkit with nvcc, for it compiles"
NVCC, CUDA = "DG_JIT_NVCC_COMPILER", "/usr/local/cuda"
"""The library's own variable, and where it looks at last."""
MULTIPLE = 128
"""Of both sizes: the side of a block of scales, and of the rows that SM90's kernels take at a time."""
ALIGNMENT = "get_mk_alignment_for_contiguous_layout"
LAYOUT = "transform_sf_into_required_layout"
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


def by_powers_of_two(contract: Contract) -> Contract:
    """The same arithmetic with E8M0 scales: activations' rounded up to powers of two, weights quantised anew."""
    recipe = replace(contract.recipe, scale_rounding="power_of_two", w13="requantised", w2="requantised")
    return replace(contract, recipe=recipe)


class DeepGemmStages(LibraryBackend):
    """The stages. Scales are fp32 as the checkpoint has them, which SM90's kernels take; on SM10x they have to be
    powers of two, which are `PowersOfTwo`'s.

    Raises:
        BackendUnavailable: another device or no library.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    written_from = "vllm 0.25.1"
    tried_on = "an H200"
    package = MODULE
    names: ClassVar[tuple[str, ...]]
    """Functions of the library."""
    e8m0: ClassVar[bool] = False
    """Scales are powers of two."""
    devices: ClassVar[str] = "this adapter has DeepGEMM's fp32 scales alone, which are for CUDA SM90"

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not self.takes_device(platform):
            raise BackendUnavailable(f"{name}: {self.devices}, not {platform.architecture}")
        refusal = _refused(config, quant, weights) or self.refused_activation()
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        interprets(name)
        self.deep_gemm = self.library()

    def takes_device(self, platform: Platform) -> bool:
        return _is_hopper(platform)

    def alignment(self) -> int:
        """Of an expert's first row, as the library has it at present: it is one number for the whole process."""
        return int(getattr(self.deep_gemm, ALIGNMENT)())

    def check_alignment(self) -> None:
        """
        Raises:
            BackendUnavailable: it is another than the one that is declared.
        """
        alignment = self.alignment()
        if alignment != MULTIPLE:
            remedy = f"deep_gemm.set_mk_alignment_for_contiguous_layout({MULTIPLE}) before layers are made"
            raise BackendUnavailable(f"{type(self).__name__}: {ALIGNMENT}() is {alignment}: call {remedy}")

    def check_sizes(self) -> None:
        """
        Raises:
            LayerNotSupported: sizes that are not whole blocks.
        """
        inter = self.config.intermediate_size_per_partition
        sizes = {"hidden_dim": self.config.hidden_dim, "intermediate_size_per_partition": inter}
        wrong = [f"{name}={size}: expected a multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
        if wrong:
            raise LayerNotSupported(f"{type(self).__name__}: {'; '.join(wrong)}")

    def matrices_of_layer(self) -> dict[str, tuple[Tensor, Tensor]]:
        """w13 and w2 with their scales, as the library takes them."""
        given = self.converted_weights(self.platform(), e8m0=self.e8m0)
        return {"w13": self.operand(given.w13, given.w13_scale), "w2": self.operand(given.w2, given.w2_scale)}

    def operand(self, matrix: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """(E, N, K) codes and (E, N / 128, K / 128) fp32 scales to the pair that the library takes."""
        assert scale is not None
        return matrix.contiguous(), scale.contiguous()

    def library(self) -> Any:
        """The module with `names`.

        Raises:
            BackendUnavailable: it does not load, lacks one of them, or has no compiler.
        """
        name = type(self).__name__
        _offer_vllms_copy(name)
        library = loaded(MODULE, self.names, name, REMEDY)
        missing = no_compiler(os.environ)
        if missing:
            raise BackendUnavailable(f"{name}: {missing}")
        return library

    @classmethod
    def lacks_here(cls, platform: Platform, env: Mapping[str, str]) -> str:
        return no_compiler(env)

    def empty_codes(self, like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        """Undefined codes (..., rows, columns), and fp32 scales (..., rows, columns / 128) with the rows next to each
        other in memory, of which the library copies nothing."""
        *batches, rows, columns = shape
        codes = like.new_empty(*shape, dtype=float8_e4m3fn)
        return codes, empty_rows_fastest(like.new_empty(0, dtype=float32), *batches, rows, -(-columns // MULTIPLE))

    def quantised_to(self, hidden_states: Tensor, places: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        """(rows, H) to codes (*shape, H) and scales, each row's in the places of its pairs; what has no pair is left
        undefined.

        Args:
            places: as `fp8moe.kernels.fused.quantize_to_places` has them.
        """
        from fp8moe.kernels.fused import quantize_to_places

        codes, scale = self.empty_codes(hidden_states, *shape, hidden_states.shape[1])
        given = (hidden_states, places, codes.flatten(0, -2), scale)
        with device_guard(codes.device):
            quantize_to_places(*given, amax_floor=BY_DEEPGEMM.recipe.amax_floor, power_of_two=self.e8m0)
        return codes, scale

    def requantised(self, gate_up: Tensor, places: Tensor, rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(rows, 2I) or (E, rows, 2I) bf16 to codes and scales of the activation, both laid out as `empty_codes`.

        Args:
            places: as `fp8moe.kernels.fused.activate_quantize` has them; other rows are left undefined.
            rows: as `show` has it.
        """
        from fp8moe.kernels.fused import activate_quantize

        flat = gate_up.flatten(0, -2)
        if self.observe is not None:
            self.show("activation", self.activated_by_triton(flat), rows)
        codes, scale = self.empty_codes(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2)
        given = (flat, self.config.activation, places, codes.flatten(0, -2), scale)
        with device_guard(gate_up.device):
            activate_quantize(*given, amax_floor=BY_DEEPGEMM.recipe.amax_floor, power_of_two=self.e8m0)
        self.show("requantisation", codes.flatten(0, -2), rows)
        return codes, scale


class PowersOfTwo(DeepGemmStages):
    """The stages with E8M0 scales: the weights quantised anew, once. On SM90 scales are fp32 numbers all the same, and
    the kernels those of the other recipe. On SM10x the library's own function packs exponents, the weights' once and in
    each call the activations'; what its matrix units do there is not declared, and it has run on none.

    Layers are of whole blocks; any number of tokens, and any other size, is DeepGEMM's. VLLM_USE_DEEP_GEMM_E8M0 has no
    part in it: who names the class has chosen.

    Raises:
        BackendUnavailable: another device or no library, or another alignment of the library's tiles.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    tried_on = "an H200"
    e8m0 = True
    devices = "DeepGEMM's E8M0 scales are for CUDA SM90 and SM10x"

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.check_sizes()
        self.check_alignment()  # on SM10x it is the height of every tile
        if not _is_hopper(self.platform()):
            self.contract = Contract(self.contract.recipe)

    def takes_device(self, platform: Platform) -> bool:
        return _is_hopper(platform) or platform.is_cuda_family(100)

    def operand(self, matrix: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, powers = super().operand(matrix, scale)
        if _is_hopper(self.platform()):
            return codes, powers
        experts, rows, columns = codes.shape
        packed = getattr(self.deep_gemm, LAYOUT)(
            sf=powers, mn=rows, k=columns, recipe=(1, MULTIPLE, MULTIPLE), num_groups=experts, is_sfa=False
        )
        return codes, packed


def no_compiler(env: Mapping[str, str]) -> str:
    """Why the nvcc that DeepGEMM calls for each new shape is not there; "" where it is, or where it uses NVRTC."""
    if env.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return ""
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH") or (str(Path(on_path).parents[1]) if on_path else CUDA)
    compiler = env.get(NVCC) or f"{home}/bin/nvcc"
    if shutil.which(compiler, path=env.get("PATH")):
        return ""
    return (
        f"DeepGEMM's kernels are compiled at the first call by {compiler}, which is not there; install the CUDA "
        f"toolkit, 12.3 or newer, and set CUDA_HOME to it, or {NVCC} to its nvcc"
    )


def _is_hopper(platform: Platform) -> bool:
    return platform.is_cuda and platform.cap == 90


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
