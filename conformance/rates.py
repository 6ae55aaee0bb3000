"""What a device can do at most, by the name that its driver gives it: memory bandwidth and dense matrix rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Peaks as the vendor publishes them, never reached: a floor from them is a floor.

    Args:
        bandwidth: of the device's memory, bytes a second.
        fp8, sixteen_bit: dense multiplications and additions a second, FP8 and bf16; where a data sheet gives a figure
            with sparsity, half of it.
        source: where they are published.
    """

    bandwidth: float
    fp8: float
    sixteen_bit: float
    source: str

    def flops_for(self, scheme: str) -> float:
        """The rate of a quantisation scheme's GEMMs."""
        return self.sixteen_bit if scheme == "none" else self.fp8


_T = 1e12
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"

# A part of a device (MIG) has a longer name, and so no entry: its rates are not these.
RATES: dict[str, Rates] = {
    "NVIDIA H100 80GB HBM3": Rates(3.35 * _T, 1979 * _T, 989.5 * _T, f"{_H100}, SXM"),
    "NVIDIA H200": Rates(4.8 * _T, 1979 * _T, 989.5 * _T, f"{_H200}, SXM"),
    "NVIDIA B200": Rates(8.0 * _T, 4500 * _T, 2250 * _T, "NVIDIA DGX B200 data sheet, an eighth"),
    "NVIDIA L40S": Rates(0.864 * _T, 733 * _T, 362.05 * _T, "NVIDIA L40S data sheet"),
    "AMD Instinct MI300X": Rates(5.3 * _T, 2614.9 * _T, 1307.4 * _T, "AMD Instinct MI300X data sheet"),
    "AMD Instinct MI325X": Rates(6.0 * _T, 2614.9 * _T, 1307.4 * _T, "AMD Instinct MI325X data sheet"),
}


def rates_of(device_name: str) -> Rates | None:
    """The rates of a device, by exactly this name; None where they are not known."""
    return RATES.get(device_name)
