"""Whether what `apply` returned has the form of a result."""

from __future__ import annotations

from torch import Tensor


def form_of_result(output: object, hidden: Tensor) -> str:
    """What is wrong with it, beside the hidden states that it was called with; "" where nothing is."""
    if type(output) is not Tensor:  # a subclass may answer every question about itself as it likes
        return f"apply returned a {type(output).__module__}.{type(output).__name__}: expected a plain torch.Tensor"
    for name in ("shape", "dtype", "device"):
        if getattr(output, name) != getattr(hidden, name):
            return f"apply returned {name} {getattr(output, name)}: expected {getattr(hidden, name)}"
    if output.numel() and output.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr():
        return "apply returned memory of its input"
    return ""
