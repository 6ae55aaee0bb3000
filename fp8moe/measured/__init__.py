"""The measured policy: the fastest certified backend among those that the selector accepts, by a table of times.

It stands beside the seed's order, which stays the default, and falls back to it where nothing was measured.
"""

from fp8moe.measured.explanation import CandidateTime, MeasuredSelection, explain_measured
from fp8moe.measured.here import installed_versions
from fp8moe.measured.policy import select_measured
from fp8moe.measured.regret import PointRegret, PolicyRegret, Regrets, policy_regret
from fp8moe.measured.rows import Certificate, InvalidMeasuredTable, LayerShape, MeasuredDevice, MeasuredRow
from fp8moe.measured.table import Fallback, MeasuredTable

__all__ = [
    "CandidateTime",
    "Certificate",
    "Fallback",
    "InvalidMeasuredTable",
    "LayerShape",
    "MeasuredDevice",
    "MeasuredRow",
    "MeasuredSelection",
    "MeasuredTable",
    "PointRegret",
    "PolicyRegret",
    "Regrets",
    "explain_measured",
    "installed_versions",
    "policy_regret",
    "select_measured",
]
