"""What is compared with what: layers of published models, numbers of tokens, our backends and vLLM's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from conformance.cases import Case

CALLERS = "fp8moe_vllm.callers"


@dataclass(frozen=True)
class Shape:
    """A layer, as one device of the usual split has it."""

    name: str
    title: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    scheme: str

    def case(self, tokens: int) -> Case:
        sizes = {"experts": self.experts, "top_k": self.top_k, "hidden": self.hidden, "inter": self.inter}
        return Case(**sizes, tokens=tokens, scheme=self.scheme)  # type: ignore[arg-type]


SHAPES = (
    Shape("dsv3-tp8", "DeepSeek-V3 TP8", 256, 8, 7168, 256, "block"),
    Shape("dsv3-32", "DeepSeek-V3, 32 local experts", 32, 8, 7168, 2048, "block"),
    Shape("qwen3-30b", "Qwen3-30B-A3B", 128, 8, 2048, 768, "block"),
    Shape("qwen3-235b-tp4", "Qwen3-235B-A22B TP4", 128, 8, 4096, 384, "block"),
    Shape("mixtral-tp2", "Mixtral-8x7B TP2", 8, 2, 4096, 7168, "channel_tok"),
    Shape("qwen3-30b-ch", "Qwen3-30B-A3B", 128, 8, 2048, 768, "channel_tok"),
)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
TELLING = (16, 256, 4096)
"""Decode, a mixed batch, prefill: these come first."""
# Of each of our backends, the class that has the same kernels; where ours hands a call to Triton, vLLM's that does so.
RIVALS = {
    "DEEPGEMM": "DeepGemmCaller",
    "VLLM_CUTLASS": "CutlassCaller",
    "MARLIN": "MarlinCaller",
    "TRITON": "TritonCaller",
}
HANDED_ON = "TritonOrDeepGemmCaller"
OF_SCHEME = {"block": ("DEEPGEMM", "MARLIN", "TRITON"), "channel_tok": ("VLLM_CUTLASS", "MARLIN", "TRITON")}
FEWEST, NARROW = 128, 512
"""Tokens that DEEPGEMM computes by DeepGEMM, and the intermediate size above which it does."""


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        ours: a backend's name.
        theirs: a class of `fp8moe_vllm.callers`.
        handed_on: our DEEPGEMM leaves this call to Triton, which is compared by itself.
    """

    shape: Shape
    tokens: int
    ours: str
    theirs: str
    handed_on: bool = False

    @property
    def rival(self) -> str:
        return f"{CALLERS}:{self.theirs}"

    @property
    def name(self) -> str:
        return f"{self.shape.name} M={self.tokens} {self.ours}"


def cell(shape: Shape, tokens: int, ours: str) -> Cell:
    found = Cell(shape, tokens, ours, RIVALS[ours])
    if ours == "DEEPGEMM" and (tokens < FEWEST or shape.inter <= NARROW):
        return replace(found, theirs=HANDED_ON, handed_on=True)
    return found


def cells(shapes: Sequence[Shape], tokens: Sequence[int], backends: Sequence[str]) -> list[Cell]:
    """In the order in which they are timed: the most telling numbers of tokens first, what is handed on last."""
    order = [number for number in TELLING if number in tokens] + [n for n in tokens if n not in TELLING]
    found = [
        cell(shape, number, ours)
        for number in order
        for shape in shapes
        for ours in OF_SCHEME[shape.scheme]
        if ours in backends
    ]
    return sorted(found, key=lambda one: one.handed_on)
