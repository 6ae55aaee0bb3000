"""Published mixture-of-experts models as data: sizes, routing, FP8 schemes of their checkpoints, splits people serve.

Sizes are those of each checkpoint's `config.json` (experts, experts per token, hidden size, expert intermediate size);
the comment at each entry names where they were checked. Nothing here imports torch until a configuration is asked for.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

if TYPE_CHECKING:
    import torch

SPLIT = re.compile(r"(tp|ep|dp)([1-9][0-9]{0,4})(?:r(0|[1-9][0-9]{0,4}))?")


class SplitError(ValueError):
    """No such model, or a split that is malformed or does not divide the model."""


@dataclass(frozen=True)
class Split:
    """How a layer is spread over devices: "tp8", "ep64" or "dp16", with "r3" for a rank other than 0.

    Args:
        kind: "tp" divides every expert; "ep" divides the experts over the tensor-parallel ranks; "dp" divides the
            experts over data-parallel ranks, which exchange tokens.
        size: number of devices.
        rank: this device.
    """

    kind: str
    size: int
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Split:
        """From text such as "tp8" or "ep64r3".

        Raises:
            SplitError: other text, a rank outside its size, "ep1" or "dp1".
        """
        match = SPLIT.fullmatch(text)
        if match is None:
            raise SplitError(f"a split such as tp8, ep64 or dp16r3, not {text!r}")
        split = cls(match[1], int(match[2]), int(match[3] or 0))
        if split.rank >= split.size:
            raise SplitError(f"a rank below {split.size} in the split {text!r}")
        if split.size == 1 and split.kind != "tp":
            raise SplitError(f"tp1 instead of {text!r}: one device has all experts")
        return split

    @property
    def tp_size(self) -> int:
        """Into how many parts each expert is divided."""
        return self.size if self.kind == "tp" else 1

    @property
    def ep_size(self) -> int:
        """Over how many ranks the experts are divided."""
        return 1 if self.kind == "tp" else self.size

    def __str__(self) -> str:
        return f"{self.kind}{self.size}" + (f"r{self.rank}" if self.rank else "")


@dataclass(frozen=True)
class Router:
    """What `fp8moe.routing.route` needs besides logits and top-k; `biased`: a correction bias steers the choice."""

    method: RoutingMethodType
    num_expert_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    biased: bool = False


@dataclass(frozen=True)
class Model:
    """A published model's MoE layer.

    Args:
        name: key in `MODELS` and in case ids.
        title: as its makers write it.
        experts: routed experts, E.
        top_k: k.
        hidden: H.
        inter: I of a whole expert.
        router: routing method and its parameters.
        logits: dtype of the router's logits, "bf16" or "fp32"; "bf16" stands for the hidden states' dtype.
        schemes: of published FP8 checkpoints, the usual one first.
        splits: as people serve it, the usual one first; wide ones last, which leave little on a device: at most
            128 MiB of FP8 weights, so that every model fits into a small machine's tests.
        weight_on_input: the routing weight multiplies the hidden states.
        activation: of the experts.
    """

    name: str
    title: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    router: Router
    logits: str
    schemes: tuple[str, ...]
    splits: tuple[str, ...]
    weight_on_input: bool = False
    activation: str = "silu"

    @property
    def routing_method(self) -> RoutingMethodType:
        return self.router.method

    @property
    def default_split(self) -> str:
        return self.splits[0]

    def config(
        self,
        split: str | Split,
        *,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
        device: torch.device | str = "cpu",
        max_num_tokens: int = 256,
        all2all_backend: str = "allgather_reducescatter",
        has_bias: bool = False,
    ) -> FusedMoEConfig:
        """The layer as one device of a split sees it.

        Args:
            split: text as `Split.parse` takes it.
            dtype: of the hidden states, default bf16.
            activation: in place of the model's own.
            all2all_backend: matters for "dp" splits; "deepep_low_latency" and "pplx" give the batched format.

        Raises:
            SplitError: a split that is malformed or does not divide this model.
        """
        import torch

        split = self.divided_by(split)
        shared: dict[str, Any] = {"all2all_backend": all2all_backend, "enable_expert_parallel": split.kind != "tp"}
        if split.kind == "dp":
            parallel = FusedMoEParallelConfig.make(dp_size=split.size, dp_rank=split.rank, **shared)
        else:
            parallel = FusedMoEParallelConfig.make(tp_size=split.size, tp_rank=split.rank, **shared)
        activation = activation or self.activation
        return FusedMoEConfig(
            num_experts=self.experts,
            experts_per_token=self.top_k,
            hidden_dim=self.hidden,
            intermediate_size_per_partition=self.inter // split.tp_size,
            num_local_experts=self.experts // split.ep_size,
            activation=activation,
            device=device,
            routing_method=self.routing_method,
            moe_parallel_config=parallel,
            in_dtype=dtype or torch.bfloat16,
            router_logits_dtype=torch.float32 if self.logits == "fp32" else None,
            max_num_tokens=max_num_tokens,
            has_bias=has_bias,
            is_act_and_mul=not activation.endswith("_no_mul"),
        )

    def divided_by(self, split: str | Split) -> Split:
        """The split, if it divides this model.

        Raises:
            SplitError: it is malformed, or does not.
        """
        split = Split.parse(split) if isinstance(split, str) else split
        if self.inter % split.tp_size:
            raise SplitError(f"a tp size that divides I={self.inter}, not {split}")
        if self.experts % split.ep_size:
            raise SplitError(f"an ep size that divides E={self.experts}, not {split}")
        return split


def model_and_split(text: str) -> tuple[Model, Split]:
    """From "deepseek-v3:tp8".

    Raises:
        SplitError: no such model, no split, or a split that does not divide the model.
    """
    name, _, split = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        raise SplitError(f"NAME:SPLIT with a NAME of {', '.join(MODELS)}" + (f"; {close[0]}?" if close else ""))
    return MODELS[name], MODELS[name].divided_by(split)


_SOFTMAX = Router(RoutingMethodType.Renormalize)  # softmax and a renormalised top-k, specification section 3.4
_LLAMA4 = Router(RoutingMethodType.Llama4)


def _sigmoid(groups: int, kept: int, factor: float) -> Router:
    return Router(RoutingMethodType.DeepSeekV3, groups, kept, factor, biased=True)


_QWEN = ("block", "channel_tok")  # Qwen's own *-FP8, and RedHatAI's *-FP8-dynamic
_MIXTRAL = ("tensor_static", "tensor_dyn")  # RedHatAI's (neuralmagic's) Mixtral-*-Instruct-v0.1-FP8 and -FP8-dynamic
_LLAMA = ("channel_tok", "tensor_static")  # Meta's and RedHatAI's compressed-tensors, NVIDIA's ModelOpt

_TABLE = (
    # deepseek-ai/DeepSeek-V3 and -R1 config.json; transformers deepseek_v3/configuration_deepseek_v3.py (defaults:
    # 256 experts, 8 a token, 7168, 2048, n_group 8, topk_group 4, scaling 2.5); weight_block_size [128, 128], dynamic.
    # Logits: vllm deepseek_v2.py passes the gate's own dtype on, bf16 unless the config says otherwise.
    Model(
        "deepseek-v3", "DeepSeek-V3/R1", 256, 8, 7168, 2048, _sigmoid(8, 4, 2.5), "bf16", ("block",),
        ("tp8", "tp16", "ep8", "ep16", "dp16", "dp32", "ep32", "ep64", "ep128"),
    ),
    # Qwen/Qwen3-30B-A3B config.json; slime scripts/models/qwen3-30B-A3B.sh. 768 / 4 is no multiple of 128: the block
    # checkpoint cannot be served with tp4 or tp8, and people add expert parallelism instead.
    Model(
        "qwen3-30b-a3b", "Qwen3-30B-A3B", 128, 8, 2048, 768, _SOFTMAX, "bf16", _QWEN,
        ("tp1", "tp2", "ep2", "ep4", "ep8", "ep16"),
    ),
    # Qwen/Qwen3-235B-A22B config.json; slime scripts/models/qwen3-235B-A22B.sh. As above: 1536 / 8 = 192.
    Model(
        "qwen3-235b-a22b", "Qwen3-235B-A22B", 128, 8, 4096, 1536, _SOFTMAX, "bf16", _QWEN,
        ("tp4", "ep8", "ep4", "dp8", "ep16", "ep32"),
    ),
    # Qwen/Qwen3-Coder-480B-A35B-Instruct(-FP8) config.json, quoted in vllm-kunlun's documentation and in two public
    # model tables. 2560 / 8 = 320: served with tp4 or with expert parallelism.
    Model(
        "qwen3-coder-480b", "Qwen3-Coder-480B-A35B", 160, 8, 6144, 2560, _SOFTMAX, "bf16", _QWEN,
        ("ep8", "tp4", "dp8", "ep16", "ep32", "ep80"),
    ),
    # mistralai/Mixtral-8x7B-v0.1 config.json; transformers mixtral/configuration_mixtral.py (its defaults).
    Model(
        "mixtral-8x7b", "Mixtral-8x7B", 8, 2, 4096, 14336, _SOFTMAX, "bf16", _MIXTRAL,
        ("tp2", "tp1", "tp4", "tp8", "ep8", "tp16"),
    ),
    # mistralai/Mixtral-8x22B-v0.1 config.json; Megatron-LM configuration guides give 6144 and 16384.
    Model(
        "mixtral-8x22b", "Mixtral-8x22B", 8, 2, 6144, 16384, _SOFTMAX, "bf16", _MIXTRAL,
        ("tp8", "tp4", "ep8", "tp16", "tp32"),
    ),
    # meta-llama/Llama-4-Scout-17B-16E config.json; transformers llama4/configuration_llama4.py (its defaults). vllm
    # llama4.py: sigmoid of the top logit, apply_router_weight_on_input=True, logits in the model's dtype.
    Model(
        "llama-4-scout", "Llama-4-Scout-17B-16E", 16, 1, 5120, 8192, _LLAMA4, "bf16", _LLAMA,
        ("tp8", "tp4", "tp1", "ep8", "ep16"), weight_on_input=True,
    ),
    # meta-llama/Llama-4-Maverick-17B-128E config.json, text_config: as Scout with 128 experts.
    Model(
        "llama-4-maverick", "Llama-4-Maverick-17B-128E", 128, 1, 5120, 8192, _LLAMA4, "bf16", _LLAMA,
        ("tp8", "ep8", "ep16", "ep64", "ep128"), weight_on_input=True,
    ),
    # zai-org/GLM-4.5 config.json; slime scripts/models/glm4.5-355B-A32B.sh; GLM-5 report, table of both. vllm
    # glm4_moe.py: the gate and router_logits_dtype are fp32. zai-org/GLM-4.5-FP8 is compressed-tensors, per channel and
    # per token.
    Model(
        "glm-4.5", "GLM-4.5", 160, 8, 5120, 1536, _sigmoid(1, 1, 2.5), "fp32", ("channel_tok",),
        ("tp8", "tp4", "ep8", "ep16", "ep32"),
    ),
    # moonshotai/Kimi-K2-Instruct config.json: DeepSeek's architecture with 384 experts, n_group 1, scaling 2.827.
    Model(
        "kimi-k2", "Kimi-K2", 384, 8, 7168, 2048, _sigmoid(1, 1, 2.827), "bf16", ("block",),
        ("tp16", "tp8", "ep16", "dp16", "dp32", "ep32", "ep64", "ep128"),
    ),
    # MiniMaxAI/MiniMax-M2 config.json; Megatron Bridge documentation (256 experts, top-8, sigmoid with a bias, FP8
    # blocks); vllm minimax_m2.py: router_logits_dtype fp32, renormalised. 1536 / 8 = 192: tp4, or expert parallelism.
    Model(
        "minimax-m2", "MiniMax-M2", 256, 8, 3072, 1536, _sigmoid(1, 1, 1.0), "fp32", ("block",),
        ("tp4", "ep8", "ep4", "dp8", "ep16", "ep64"),
    ),
)  # fmt: skip
MODELS: dict[str, Model] = {model.name: model for model in _TABLE}
