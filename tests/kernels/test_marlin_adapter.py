"""MARLIN by our kernels, vLLM's operators played: few pairs in one launch are computed as they are in two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from fp8moe import PLATFORMS, Platform
from fp8moe.backends.marlin import MarlinExperts
from fp8moe.kernels import few
from tests.contracts import played_marlin
from tests.contracts.layers import case, same, with_holes


class PlayedMarlin(MarlinExperts):
    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def multiprocessors(self) -> int:
        return 3

    def library(self) -> Any:
        return SimpleNamespace(moe_wna16_marlin_gemm=played_marlin.gemm, moe_align_block_size=self.align)

    def align(self, *given: Any) -> None:
        self.aligned = True
        played_marlin.align(*given)


def computed(tensors: CaseTensors) -> tuple[Tensor, bool]:
    """And whether vLLM's operator was asked."""
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    return tensors.call(adapter), hasattr(adapter, "aligned")


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens": 1}, {"tokens": 40}, {"ep": "2:1"}, {"law": "skewed"}, {"layout": "strided"}],
    ids=["plain", "one token", "larger tiles", "a rank of two", "few experts", "rows apart"],
)
def test_few_pairs_as_many(
    fields: dict[str, Any], holes: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("the operators are played on the CPU")
    tensors = with_holes(case("block", **fields)) if holes else build(case("block", **fields), "cpu")
    found, asked = computed(tensors)
    assert not asked
    monkeypatch.setattr(few, "FEW", 0)
    expected, asked = computed(tensors)
    assert asked
    assert same(found, expected)
