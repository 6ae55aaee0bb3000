"""Random numbers as a function of (seed, name, position): the same bits on every device and every version of torch.

Each named stream is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) used
as a counter: word i is mix(key + i * odd constant), and the key is a hash of the seed and the name. Nothing is drawn in
sequence, so a tensor does not depend on what else a case draws, on the order, on the chunk size, or on the device.

Only integer arithmetic modulo 2^64 and exact conversions are used. No generator of torch: its streams differ between
devices, and it promises none between versions. None of numpy: its policy (NEP 19) keeps the raw words of a bit
generator, not what `Generator` makes of them. No libm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND = -7723592293110705685  # 0x94D049BB133111EB

CHUNK_WORDS = {"cpu": 1 << 15}
"""Words made at once: on a CPU as many as stay in its cache; elsewhere enough to keep a GPU busy."""
CHUNK_WORDS_ELSEWHERE = 1 << 23

NORMAL_PEAK = 131070  # four 16-bit numbers of 65535, halved
NORMAL_STEP = 1 / 37837.0  # the standard deviation of their sum is 37836.75


class Draw:
    """The random numbers of one seed.

    Args:
        seed: any integer from 0 to 2^63 - 1.
        device: where the numbers are made, and stay.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)

    def on(self, device: torch.device | str) -> Draw:
        """The same numbers on another device."""
        return Draw(self.seed, device)

    @property
    def chunk_words(self) -> int:
        return CHUNK_WORDS.get(self.device.type, CHUNK_WORDS_ELSEWHERE)

    def words(self, name: str, count: int, start: int = 0) -> Tensor:
        """Words `start` to `start + count` of a stream, int64: 64 random bits each."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        words = torch.arange(start, start + count, dtype=torch.int64, device=self.device)
        words.mul_(GOLDEN).add_(key)
        words.bitwise_xor_(_shift(words, 30)).mul_(FIRST)
        words.bitwise_xor_(_shift(words, 27)).mul_(SECOND)
        return words.bitwise_xor_(_shift(words, 31))

    def integers(self, name: str, shape: Sequence[int], high: int) -> Tensor:
        """int64 from 0 to high - 1; high at most 2^31. Uneven by less than high / 2^31."""
        return self._shaped(name, shape, lambda words: (_shift(words, 33) * high) >> 31)

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        """fp32 multiples of 2^-24 from 0 to below 1."""
        return self._shaped(name, shape, lambda words: _shift(words, 40).to(torch.float32) * 2.0**-24)

    def sign(self, name: str, shape: Sequence[int]) -> Tensor:
        """fp32 +1 or -1."""
        return self._shaped(name, shape, lambda words: 1.0 - 2.0 * _shift(words, 63).to(torch.float32))

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """fp32, nearly Gaussian with mean 0 and deviation 1: a sum of four uniform numbers, so within 3.47."""

        def bell(words: Tensor) -> Tensor:
            total = (words & 0xFFFF) + (_shift(words, 16) & 0xFFFF) + (_shift(words, 32) & 0xFFFF) + _shift(words, 48)
            return (total - NORMAL_PEAK).to(torch.float32) * NORMAL_STEP

        return self._shaped(name, shape, bell)

    def binades(self, name: str, shape: Sequence[int], low: int, high: int) -> Tensor:
        """fp32 from 2^low to below 2^high: the binade is uniform, and the place within it."""

        def assemble(words: Tensor) -> Tensor:
            exponent = ((_shift(words, 40) * (high - low)) >> 24) + (127 + low)
            return ((exponent << 23) | (words & 0x7FFFFF)).to(torch.int32).view(torch.float32)

        return self._shaped(name, shape, assemble)

    def gather(self, name: str, shape: Sequence[int], table: Tensor) -> Tensor:
        """Entries of a table of 65,536, each equally likely; the table's dtype. Made in chunks: for weights."""
        count = math.prod(shape)
        out = torch.empty(count, dtype=table.dtype, device=self.device)
        table = table.to(self.device)
        step = 4 * self.chunk_words
        for begin in range(0, count, step):
            end = min(begin + step, count)
            words = self.words(name, -(-(end - begin) // 4), begin // 4)
            places = words.view(torch.int16)[: end - begin].to(torch.int32).bitwise_and_(0xFFFF)
            torch.index_select(table, 0, places, out=out[begin:end])
        return out.view(tuple(shape))

    def _shaped(self, name: str, shape: Sequence[int], make: Callable[[Tensor], Tensor]) -> Tensor:
        count = math.prod(shape)
        if count <= self.chunk_words:
            return make(self.words(name, count)).view(tuple(shape))
        parts = [
            make(self.words(name, min(self.chunk_words, count - begin), begin))
            for begin in range(0, count, self.chunk_words)
        ]
        return torch.cat(parts).view(tuple(shape))


def _shift(words: Tensor, places: int) -> Tensor:
    """Shift to the right with zeros from the left; torch's own shift of int64 repeats the sign."""
    return (words >> places) & ((1 << (64 - places)) - 1)
