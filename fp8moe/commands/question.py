"""From names, as a command line has them, to the selector's arguments; an unknown one ends in a line with a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8moe.config import ACTIVATIONS, ALL2ALL_BACKENDS, FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.envs import SELECTOR_VARIABLES
from fp8moe.near import plain, remedy
from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform, detected_platform

if TYPE_CHECKING:
    from conformance.models import Split
    from fp8moe.selector import Selection

HERE = "here"
FORMATS = ("standard", "batched")
DTYPES = ("bfloat16", "float16", "float32")
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_MODEL = "deepseek-v3"


class BadInput(ValueError):
    """Something on the command line is not understood; the text is one line and says what would be."""


def refuse_unknown(backend: str) -> None:
    """Soon, where no plug-in is installed: torch takes seconds to import.

    Raises:
        BadInput: no backend has this name; the text has the near names.
    """
    from conformance.not_here import surely_unknown

    unknown = surely_unknown(backend)
    if unknown is not None:
        raise BadInput(str(unknown))


def pick(what: str, given: str, known: Iterable[str]) -> str:
    """`given` as one of `known` spells it; case and the choice between - and _ do not count.

    Raises:
        BadInput: none of them; the text has the near matches, or all where none is near.
    """
    spelled = {plain(name): name for name in known}
    found = spelled.get(plain(given))
    if found is not None:
        return found
    raise BadInput(f"{what} {given!r} is not known; {remedy(given, spelled.values())}")


def one_platform(name: str, libraries: str | None) -> tuple[str, Platform]:
    """A device of the catalogue, or the one that is here, and its name as we spell it.

    Args:
        libraries: those that are to be there instead, with commas between; "none" for none.

    Raises:
        BadInput: an unknown device or library.
    """
    key = pick("--platform", name, (HERE, *PLATFORMS))
    platform = detected_platform() if key == HERE else PLATFORMS[key]
    if libraries is None:
        return key, platform
    names = [text.strip() for text in libraries.split(",") if text.strip()]
    if [text.lower() for text in names] == ["none"]:
        names = []
    return key, platform.with_libraries(*(pick("--libraries", text, LIBRARIES) for text in names))


def environment(assignments: Sequence[str], process: Mapping[str, str] | None) -> dict[str, str]:
    """The selector's variables: those of `process` (None: of no process), with NAME=VALUE texts on top.

    Raises:
        BadInput: a text that is no assignment, or names a variable that the selector does not read.
    """
    found = {name: process[name] for name in SELECTOR_VARIABLES if name in process} if process is not None else {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--env {text!r}: expected NAME=VALUE, such as {SELECTOR_VARIABLES[0]}=1")
        if name not in SELECTOR_VARIABLES:
            spelled = pick("--env variable", name, SELECTOR_VARIABLES)  # raises, unless only the case is wrong
            raise BadInput(f"--env variable {name!r} is not known; did you mean {spelled}?")
        found[name] = value
    return found


@dataclass(frozen=True)
class Layer:
    """Sizes and habits of a layer before it is split over devices; `split` as `--model NAME:SPLIT` gives it."""

    name: str | None
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str
    routing: RoutingMethodType
    logits_dtype: str
    scheme: str
    split: Split | None = None


def layer_named(
    model: str | None,
    *,
    experts: int | None,
    top_k: int | None,
    hidden: int | None,
    intermediate: int | None,
    activation: str | None,
    routing: str | None,
    logits_dtype: str | None,
    scheme: str | None,
) -> Layer:
    """A published model's layer, "NAME" or "NAME:SPLIT" (None: DeepSeek-V3's), with what is given in its place.

    Raises:
        BadInput: an unknown name, or a split that does not divide the model.
    """
    from conformance.models import MODELS, SplitError
    from fp8moe.schemes import SCHEMES

    name, colon, split = (model or DEFAULT_MODEL).partition(":")
    published = MODELS[pick("--model", name, MODELS)]
    try:
        divided = published.divided_by(split) if colon else None
    except SplitError as error:
        raise BadInput(f"--model {model}: expected {error}") from None
    methods = [method.name for method in RoutingMethodType]
    return Layer(
        name=None if model is None else published.name,
        experts=experts or published.experts,
        top_k=top_k or published.top_k,
        hidden=hidden or published.hidden,
        intermediate=intermediate or published.inter,
        activation=pick("--activation", activation or published.activation, ACTIVATIONS),
        routing=RoutingMethodType[pick("--routing", routing or published.routing_method.name, methods)],
        logits_dtype=pick("--logits-dtype", logits_dtype or LONG_NAMES[published.logits], DTYPES),
        scheme=pick("--scheme", scheme or published.schemes[0], SCHEMES),
        split=divided,
    )


def parallel_config(
    layer: Layer,
    layout: str | None,
    all2all: str | None,
    *,
    tp: int | None,
    dp: int | None,
    ep: bool | None,
    eplb: bool,
) -> FusedMoEParallelConfig:
    """The parallel part; `layout` "batched" alone stands for dp=2, EP and deepep_low_latency.

    Raises:
        BadInput: an unknown name, sizes beside the model's split, a dispatch that has not the layout asked for.
    """
    tp_rank = dp_rank = 0
    if layer.split is not None:
        if (tp, dp, ep) != (None, None, None):
            raise BadInput(
                f"--model {layer.name}:{layer.split} has its sizes; leave out --tp, --dp, --ep, or the split"
            )
        size, rank, ep = layer.split.size, layer.split.rank, layer.split.kind != "tp"
        if layer.split.kind == "dp":
            dp, dp_rank = size, rank
        else:
            tp, tp_rank = size, rank
    layout = layout if layout is None else pick("--format", layout, FORMATS)
    if all2all is not None:
        all2all = pick("--all2all", all2all, ALL2ALL_BACKENDS)
    if layout == "batched":
        all2all = all2all or "deepep_low_latency"
        dp, ep = 2 if dp is None else dp, True if ep is None else ep
    try:
        parallel = FusedMoEParallelConfig.make(
            tp_size=1 if tp is None else tp,
            dp_size=1 if dp is None else dp,
            enable_expert_parallel=bool(ep),
            all2all_backend=all2all or "allgather_reducescatter",
            enable_eplb=eplb,
            tp_rank=tp_rank,
            dp_rank=dp_rank,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    given = "batched" if parallel.use_batched_activation_format else "standard"
    if layout not in (None, given):
        remedy = {
            "batched": "it takes --dp 2 or more, --ep, and --all2all deepep_low_latency or pplx",
            "standard": "leave out --all2all, or name another",
        }
        raise BadInput(f"--format {layout}: this dispatch hands tokens over in the {given} format; {remedy[layout]}")
    return parallel


def layer_config(layer: Layer, parallel: FusedMoEParallelConfig, *, lora: bool) -> FusedMoEConfig:
    """One device's share of the layer.

    Raises:
        BadInput: sizes that the configuration refuses, or that the parallel sizes do not divide.
    """
    import torch

    for what, size, parts, option in (
        ("experts", layer.experts, parallel.ep_size, "ranks of expert parallelism"),
        ("intermediate", layer.intermediate, parallel.tp_size, "tensor-parallel ranks"),
    ):
        if size % parts:
            raise BadInput(f"--{what} {size} does not divide by {parts} {option}; choose sizes that do")
    try:
        return FusedMoEConfig(
            num_experts=layer.experts,
            experts_per_token=layer.top_k,
            hidden_dim=layer.hidden,
            intermediate_size_per_partition=layer.intermediate // parallel.tp_size,
            num_local_experts=layer.experts // parallel.ep_size,
            activation=layer.activation,
            device="cuda",
            routing_method=layer.routing,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
            router_logits_dtype=getattr(torch, layer.logits_dtype),
            is_act_and_mul=not layer.activation.endswith("_no_mul"),
            is_lora_enabled=lora,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None


@dataclass(frozen=True)
class Question:
    """All that the selector is asked, but for the platform."""

    layer: Layer
    config: FusedMoEConfig
    allow_vllm_cutlass: bool
    env: Mapping[str, str]

    def on(self, platform: Platform) -> Selection:
        """The selector's answer for one device."""
        from fp8moe.schemes import SCHEMES
        from fp8moe.selector import explain_fp8_moe_backend

        return explain_fp8_moe_backend(
            self.config, *SCHEMES[self.layer.scheme], self.allow_vllm_cutlass, platform=platform, env=self.env
        )
