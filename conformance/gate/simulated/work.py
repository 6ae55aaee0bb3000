"""Kinds of work on the simulated device, their parameters, and which measured figure each reproduces.

Measured on one H100, 2026-11-24; `figures.py` has the figures, and the tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conformance.gate.simulated.device import Device, Episodes, Stream

UNROLLED = 20
"""Calls in a graph, as measured."""
CORRELATION = 0.2
"""Of the noise of successive replays of one version. Not measured; as much as leaves the verdicts of 40 pairs within
the measured ranges, so that the gate is tried on samples that are not independent."""

DEVICE = Device(
    boost=0.2,
    boost_us=300e3,
    excursion=0.155,
    excursions=Episodes(every_us=500e3, mean_us=30e3),
    drift=0.01,
    slow_host_us=6.0,
    slow_host=Episodes(every_us=60e3, mean_us=2.5e3),
    outliers=0.002,
    outlier_us=30.0,
    throttle=0.15,
    throttles=Episodes(every_us=100e6, mean_us=200e3),
    noticed=0.9,
)
"""The steady state, with:

- boost and excursion together: medians of single replays of a 4096^3 GEMM, begun cold, spread by 39%;
- excursion: neighbours among them differ by -14% and +10%. It lasts about one such median (200 replays of 114 us), and
  comes once or a few times in 60;
- slow_host: medians of single replays of an 11 us kernel spread by 55%, neighbours' ratio up to 1.54: the gap between
  replays is longer by half of the kernel, for about one median of 200; in 60 medians it comes about twice;
- drift, outliers and throttles show in no figure (medians do not see them), and are here to be survived.
"""


@dataclass(frozen=True)
class Work:
    """A kind of work: a stream as it was measured, and what it is called.

    The noise reproduces the range of 100 A/A verdicts of 10 pairs. `lead_us` reproduces that 21 calls take less than
    21/20 of the time of 20: the centre of the +5% range is below 1.05 by lead / (20 calls x 20).
    """

    name: str
    stream: Stream

    def of(self, call_us: float, calls: int, clock_share: float) -> Stream:
        """A graph of calls of this kind that take `call_us` each and follow the clock so far."""
        return replace(self.stream, call_us=call_us, calls=calls, clock_share=clock_share)


def _work(name: str, call_us: float, lead_us: float, noise: float, lead_noise_us: float, clock_share: float) -> Work:
    return Work(name, Stream(call_us, UNROLLED, lead_us, noise, lead_noise_us, CORRELATION, clock_share))


COPY = _work("copy 256 MiB", 178.0, 7.0, 0.0005, 0.3, 0.0005)
"""A/A 0.9991-1.0005. Its single replays (of twice the size, 444 us) spread by 0.04%: the clock share can be no more."""
LARGE_GEMM = _work("FP8 GEMM 4096^3", 112.0, 42.0, 0.0020, 0.7, 1.0)
"""A/A 0.9968-1.0021, +5% 1.0460-1.0516."""
GEMM = _work("FP8 GEMM 1024 x 4096 x 4096", 38.0, 24.0, 0.0010, 0.6, 0.9)
"""A/A 0.9979-1.0012, +5% 1.0474-1.0495."""
SHORT_GEMM = _work("FP8 GEMM 64 x 4096 x 4096", 10.3, 20.0, 0.0036, 0.7, 0.5)
"""A/A 0.9940-1.0090, +5% 1.0390-1.0514."""
WORKS = (COPY, LARGE_GEMM, GEMM, SHORT_GEMM)

OFFSET_ONE_PROCESS = 0.0005
"""Standard deviation of the steady log ratio of two equal versions in one process: the centres of the A/A ranges of the
copy and of the two larger GEMMs are off by 0.02, 0.055 and 0.045%."""
OFFSET_TWO_PROCESSES = 0.0015
"""The same in two processes: the centres of the ranges of copy and GEMM, A/A and +5%, are off by 0.115, 0.01, 0.15 and
0.25%."""
CLOCK_BETWEEN_RUNS = 0.02
"""Standard deviation of the log clock between two runs, a day apart. Not measured: large enough to need yardsticks, a
multiple of what a paired comparison sees."""
GAP_US = COPY.stream.lead_us
"""Part of every lead that is the gap before a graph."""
GAP_BETWEEN_RUNS = 0.2
"""Standard deviation of the log of this gap between two runs: another host process launches at another pace. Not
measured."""
