"""The gate: whether a version of a backend is slower than another, with error rates that are known.

Two modes of speed, never mixed: `judge_paired` runs two versions in turn, `judge_stored` compares a run with stored
ones. A sampler of a GPU is a `PairSampler` or a `RoundSampler`. `python -m conformance.gate.rates` measures the error
rates on the simulated device of `conformance.gate.simulated`.
"""
