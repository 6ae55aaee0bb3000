"""Which arithmetic a matrix product has, told by crafted dot products, on hardware that nobody described."""

from conformance.probe.backend import CHECK, Reading, Verdict, probe_backend, probed
from conformance.probe.fingerprint import Fingerprint, Unreadable, fingerprint
from conformance.probe.known import Match, emulated_dot, expected, nearest

__all__ = [
    "CHECK",
    "Fingerprint",
    "Match",
    "Reading",
    "Unreadable",
    "Verdict",
    "emulated_dot",
    "expected",
    "fingerprint",
    "nearest",
    "probe_backend",
    "probed",
]
