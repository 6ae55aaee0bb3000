"""Whether a backend left its inputs, the weights among them, as they were."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.build import CaseTensors

COPIED_BYTES = 1 << 22
PART_BYTES = 1 << 22
WORD_BYTES = 8


class Watch:
    """Remembers what a case's tensors hold."""

    def __init__(self, tensors: CaseTensors) -> None:
        self._tensors = tensors.named()
        self._before = {name: fingerprint(tensor) for name, tensor in self._tensors.items()}

    def changed(self) -> str:
        """What is not as it was, in words; "" where everything is."""
        for name, tensor in self._tensors.items():
            if not torch.equal(self._before[name], fingerprint(tensor)):
                return f"it changed its input {name}, of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        return ""


def fingerprint(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes; of a large one, for each part, a sum of its 8-byte words modulo 2^64, each times an
    odd number of its own: a change of one word always shows, and an exchange of two unlike ones almost surely."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.numel() <= COPIED_BYTES:
        return raw.clone()
    whole = raw.numel() // WORD_BYTES * WORD_BYTES
    words = raw[:whole].view(torch.int64)
    odd = torch.arange(PART_BYTES // WORD_BYTES, device=raw.device) * 2 + 1
    parts = torch.split(words, PART_BYTES // WORD_BYTES)
    sums = [(part * odd[: part.numel()]).sum() for part in parts]
    return torch.cat([torch.stack(sums), raw[whole:].to(torch.int64)])
