"""A simulated device: how long each replay of a sequence of graphs takes, disturbed as a real one's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conformance.gate.samples import Flag, Flags, Times

Array = NDArray[np.float64]
REMEMBERED = 12
"""Terms of an autoregression that are kept: with a coefficient of 0.5 the next has 2e-4 of the first."""
TAIL_FREEDOM = 4
"""Of Student's t for the noise of a replay: tails as heavy as still have a variance's estimate converge."""


@dataclass(frozen=True)
class Stream:
    """One graph of the sequence: a version of a cell, or a yardstick.

    Args:
        call_us: time of one call where nothing disturbs.
        calls: how many the graph holds.
        lead_us: time of a replay beyond its calls: the gap to the replay before, and a first call on cold caches.
        noise: standard deviation of the log time of a replay, in its core.
        lead_noise_us: mean of the exponential jitter of `lead_us`.
        correlation: of the noise of two successive replays of this stream.
        clock_share: part of the calls' time that follows the clock of the matrix units: 1 for a large GEMM.
        offset: steady, of the log time: where the version's memory lies.
    """

    call_us: float
    calls: int
    lead_us: float
    noise: float
    lead_noise_us: float
    correlation: float
    clock_share: float
    offset: float = 0.0


@dataclass(frozen=True)
class Episodes:
    """Disturbed times that begin at random: exponential waits of mean `every_us`, exponential lengths of `mean_us`."""

    every_us: float
    mean_us: float

    def share(self, rng: np.random.Generator, starts_us: Array, ends_us: Array) -> Array:
        """The part of each interval that lies in an episode, for intervals in order of time from 0 on."""
        waits = rng.exponential((self.every_us, self.mean_us), size=(self._enough(float(ends_us.flat[-1])), 2))
        if rng.random() < self.mean_us / (self.every_us + self.mean_us):
            waits[0, 0] = 0.0  # already within one
        turns = np.concatenate([[0.0], waits.ravel().cumsum()])
        inside = np.concatenate([[0.0], (waits * (0.0, 1.0)).ravel().cumsum()])
        share: Array = np.interp(ends_us, turns, inside) - np.interp(starts_us, turns, inside)
        share /= ends_us - starts_us
        return share

    def _enough(self, length_us: float) -> int:
        """Episodes that reach past the end: six standard deviations of their number above its mean, and a few."""
        mean = length_us / (self.every_us + self.mean_us)
        return int(mean + 6 * np.sqrt(mean)) + 10


@dataclass(frozen=True)
class Device:
    """What happens to all work on the device alike. Times in microseconds, sizes as parts of a time.

    Args:
        boost: by how much the clock is higher than in the steady state when a sequence begins after an idle time.
        boost_us: in which time the boost falls to 1/e.
        excursion: part by which the clock is lower during `excursions`: the second mode of its clocks.
        excursions: when.
        drift: slow and linear, of the log time, a second; its sign is drawn for each sequence.
        slow_host_us: added to each lead while the host is late (`slow_host`).
        slow_host: when.
        outliers: part of the replays that something long interrupts.
        outlier_us: mean of how long.
        throttle: part by which calls slow down during `throttles`.
        throttles: when.
        noticed: part of the throttled replays that a sampler can tell.
    """

    boost: float
    boost_us: float
    excursion: float
    excursions: Episodes
    drift: float
    slow_host_us: float
    slow_host: Episodes
    outliers: float
    outlier_us: float
    throttle: float
    throttles: Episodes
    noticed: float

    def replay(
        self,
        rng: np.random.Generator,
        streams: Sequence[Stream],
        order: NDArray[np.intp],
        warm_us: float,
        apart_us: float = 0.0,
    ) -> tuple[Times, Flags]:
        """Times in microseconds and flags of one or more sequences of replays, both of the shape of `order`.

        Args:
            order: (sequences, n) which stream each replay is of.
            warm_us: how long the device was at work before each sequence.
            apart_us: from the end of a sequence to the beginning of the next.
        """
        nominal = np.array([stream.call_us * stream.calls + stream.lead_us for stream in streams])[order]
        ends = nominal.cumsum().reshape(order.shape) + apart_us * np.arange(len(order))[:, None]
        starts = ends - nominal
        since = ends - starts[:, :1] - nominal / 2
        slower = self.excursion * self.excursions.share(rng, starts, ends)
        slower -= self.boost * np.exp(-(warm_us + since) / self.boost_us)
        slower += rng.choice((-1.0, 1.0)) * self.drift * since / 1e6
        throttled = self.throttles.share(rng, starts, ends)
        share = np.array([stream.clock_share for stream in streams])[order]
        log_time = share * (slower + self.throttle * throttled) + _noise(rng, streams, order)
        lead = np.array([stream.lead_us for stream in streams])[order]
        lead += self.slow_host_us * self.slow_host.share(rng, starts, ends)
        jitter = np.array([stream.lead_noise_us for stream in streams])[order]
        lead += jitter * (rng.exponential(size=order.shape) - 1)
        calls = np.array([stream.call_us * stream.calls for stream in streams])[order]
        times = calls * np.exp(log_time) + np.maximum(lead, 0.0)
        times += (rng.random(order.shape) < self.outliers) * rng.exponential(self.outlier_us, size=order.shape)
        told = (throttled > 0) & (rng.random(order.shape) < self.noticed)
        return times, np.where(told, int(Flag.THROTTLED), 0).astype(np.uint8)


def _noise(rng: np.random.Generator, streams: Sequence[Stream], order: NDArray[np.intp]) -> Array:
    """Of the log time, (sequences, n): each stream's offset, and its own autoregression with heavy tails."""
    noise = np.empty(order.shape)
    for index, stream in enumerate(streams):
        mine = order == index
        count = int(mine.sum())
        fresh = rng.standard_t(TAIL_FREEDOM, size=count + REMEMBERED)
        fresh *= stream.noise * np.sqrt((1 - stream.correlation**2) * (TAIL_FREEDOM - 2) / TAIL_FREEDOM)
        kept = np.convolve(fresh, stream.correlation ** np.arange(REMEMBERED))
        noise[mine] = stream.offset + kept[REMEMBERED : REMEMBERED + count]
    return noise


def in_turn(count: int, streams: int = 2) -> NDArray[np.intp]:
    """(1, count x streams), the order of replays: 0, 1, ... and the same backwards in turn."""
    forth = np.arange(streams)
    both = np.concatenate([forth, forth[::-1]])
    return np.tile(both, (count + 1) // 2)[None, : count * streams]
