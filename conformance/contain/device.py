"""Opening a device, and whether it still computes: small sums whose results are known."""

from __future__ import annotations

import torch

SIDE = 64
COUNT = 1024
_SQUARES = (COUNT - 1) * COUNT * (2 * COUNT - 1) // 6
"""The sum of the squares of 0 to COUNT - 1."""
DEVICE_ERRORS = ("CUDA error", "HIP error", "device-side assert", "illegal memory access", "CUBLAS_STATUS", "XPU error")
"""What the text of torch's RuntimeError has where a device failed; torch 2.8 and later have a type for most of them."""


def ill(device: str) -> str:
    """Why a device cannot be computed on, proven by computing; "" where it is in order."""
    if device == "cpu":
        return ""
    try:
        return _wrong(device)
    except torch.OutOfMemoryError:
        return ""  # full, and in order; its memory comes back with the worker's end
    except Exception as error:  # a lost device raises whatever it likes
        return f"{type(error).__name__}: {first_line(error)}"


def _wrong(device: str) -> str:
    numbers = torch.arange(COUNT, dtype=torch.int64, device=device)
    squares = int((numbers * numbers).sum())
    ones = torch.ones(SIDE, SIDE, dtype=torch.float32, device=device)
    product = (ones @ ones).cpu()
    if squares != _SQUARES:
        return f"the squares of 0 to {COUNT - 1} add up to {squares} on it: expected {_SQUARES}"
    if not bool((product == SIDE).all()):
        return f"ones ({SIDE}, {SIDE}) times ones is not {SIDE} everywhere on it"
    return ""


def is_device_error(error: BaseException) -> bool:
    """By its type or its text."""
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERRORS)
    )


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
