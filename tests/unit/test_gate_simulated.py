"""The simulated device has the noise that was measured, and would be told from one that has not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from conformance.gate.simulated.device import Episodes, Stream, in_turn
from conformance.gate.simulated.figures import NAIVE, PAIRED, Naive, Verdicts
from conformance.gate.simulated.mix import GRAPH_US, KINDS, MIX, cells_of, unrolled
from conformance.gate.simulated.samplers import MIXED_SHARE, SimulatedPairs, SimulatedRounds, installed
from conformance.gate.simulated.work import COPY, DEVICE, SHORT_GEMM, UNROLLED, Work
from tests.unit.gate_samplers import most_expected

REPEATS = 100
CENTRAL = 0.8


def shares_below(experiments: tuple[Naive | Verdicts, ...], factor: float = 1.0) -> Iterator[tuple[str, float]]:
    """For each measured figure the share of simulated ones below it, with the noise of all streams times a factor."""
    for number, experiment in enumerate(experiments):
        rng, changed = np.random.default_rng([number, 0]), noisier(experiment, factor)
        simulated = np.array([changed.simulate(rng) for _ in range(REPEATS)])
        names = ("spread", "low", "high") if isinstance(experiment, Naive) else ("low", "high")
        for column, name in enumerate(names):
            below = simulated[:, column] < getattr(experiment, name)
            yield f"{type(experiment).__name__} {number} {name}", float(below.mean())


def noisier(experiment: Naive | Verdicts, factor: float) -> Naive | Verdicts:
    def stream(of: Stream) -> Stream:
        return replace(of, noise=of.noise * factor, lead_noise_us=of.lead_noise_us * factor)

    if isinstance(experiment, Naive):
        return replace(experiment, work=stream(experiment.work))
    return replace(experiment, works=tuple(Work(work.name, stream(work.stream)) for work in experiment.works))


def outside(shares: dict[str, float]) -> int:
    """How many measured figures lie outside the central 80% of what is simulated."""
    return sum(not (1 - CENTRAL) / 2 <= share <= (1 + CENTRAL) / 2 for share in shares.values())


def test_every_measured_figure_is_one_that_the_simulated_device_shows() -> None:
    shares = dict(shares_below((*NAIVE, *PAIRED)))
    assert len(shares) == 3 * len(NAIVE) + 2 * len(PAIRED)
    assert {name: share for name, share in shares.items() if share in (0.0, 1.0)} == {}
    assert outside(shares) <= most_expected(len(shares), 1 - CENTRAL)


@pytest.mark.parametrize("factor", [1 / 3, 2.0])
def test_a_device_with_other_noise_would_be_told_from_the_measured_one(factor: float) -> None:
    """Half of the noise is on the limit: offsets and lead, which do not change here, set some of the figures."""
    shares = dict(shares_below(PAIRED, factor))
    assert outside(shares) > most_expected(len(shares), 1 - CENTRAL)


def test_a_device_without_its_disturbances_would_not_show_the_naive_figures() -> None:
    calm = replace(DEVICE, boost=0.0, excursion=0.0, slow_host_us=0.0)
    for naive in NAIVE[1:]:
        rng = np.random.default_rng(0)
        assert max(naive.simulate(rng, calm)[0] for _ in range(20)) < naive.spread


def test_a_verdict_of_pairs_is_steady_where_a_naive_median_is_not() -> None:
    rng = np.random.default_rng(0)
    low, high = next(of for of in PAIRED if of.works == (SHORT_GEMM,) and of.calls == UNROLLED).simulate(rng)
    assert high / low - 1 < NAIVE[2].spread / 10


def test_episodes_take_their_part_of_the_time() -> None:
    episodes, rng = Episodes(every_us=900.0, mean_us=100.0), np.random.default_rng(0)
    edges = np.linspace(0.0, 5e6, 200_001)
    shares = episodes.share(rng, edges[:-1], edges[1:])
    assert shares.min() == 0.0
    assert (shares > 0.999).any()
    mean, deviation = 0.1, np.sqrt(2 * 0.1 * 100.0 / 5e6)  # of a renewal process: at most so, over 5,000 episodes
    assert abs(shares.mean() - mean) < 6 * deviation


def test_an_episode_may_cover_any_part_of_a_long_interval() -> None:
    rng = np.random.default_rng(1)
    share = Episodes(900.0, 100.0).share(rng, np.array([0.0]), np.array([1e6]))
    assert 0.0 < float(share[0]) < 1.0


def test_replays_come_in_turn() -> None:
    assert in_turn(3).tolist() == [[0, 1, 1, 0, 0, 1]]
    assert in_turn(2, 3).tolist() == [[0, 1, 2, 2, 1, 0]]


def test_the_mix_is_that_of_a_real_run() -> None:
    times = [cell.call_us for cell in MIX]
    assert len(MIX) >= 30
    assert len({cell.name for cell in MIX}) == len(MIX)
    assert min(times) < 11
    assert max(times) > 5000
    assert sum(len(cells_of(kind)) for kind in KINDS) == len(MIX)
    assert all(cells_of(kind) for kind in KINDS)


def test_graphs_have_20_calls_unless_they_would_be_long() -> None:
    assert [unrolled(us, GRAPH_US) for us in (10.0, 200.0, 400.0, 12_000.0)] == [20, 20, 10, 2]
    assert unrolled(12_000.0, np.inf) == UNROLLED


def test_simulated_times_are_those_of_the_cell() -> None:
    copy = next(cell for cell in MIX if cell.work is COPY)
    sampler = SimulatedPairs([copy], np.random.default_rng(0), slowdowns={copy.name: 0.05}, offset=0.0)
    first, second = sampler.pairs(copy.name, 40), sampler.pairs(copy.name, 2)
    graph = copy.call_us * unrolled(copy.call_us, GRAPH_US)
    lead, clocks = COPY.stream.lead_us, MIXED_SHARE * (DEVICE.boost + DEVICE.excursion)
    assert abs(np.median(first.a_us) / (graph + lead) - 1) < clocks
    expected = (1.05 * graph + lead) / (graph + lead)
    assert abs(np.median(first.b_us / first.a_us) / expected - 1) < COPY.stream.noise
    assert (first.overhead_us > 0, second.overhead_us) == (True, 0.0)


def test_two_processes_differ_and_one_is_the_same_throughout() -> None:
    here = installed(MIX[:3], np.random.default_rng(0))
    one, other = (SimulatedRounds(here, np.random.default_rng(seed)) for seed in (1, 2))
    name = MIX[2].name

    def ratio(process: SimulatedRounds) -> float:
        rounds = [process.rounds(name, 2) for _ in range(40)]
        yardstick = [of.yardsticks_us[process.yardstick(name)] for of in rounds]
        return float(np.median(np.concatenate([of.cell_us for of in rounds]) / np.concatenate(yardstick)))

    assert abs(ratio(one) / ratio(one) - 1) < abs(ratio(one) / ratio(other) - 1)
