"""TOY_BROKEN: TOY with one fault, for the suite to find."""

from __future__ import annotations

from typing import Any

from toy_vendor.experts import ToyVendorExperts


class ToyBrokenExperts(ToyVendorExperts):
    """The second GEMM takes the weight scales of expert 0 for every expert."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.w2_scale = self.w2_scale[:1].expand_as(self.w2_scale)
