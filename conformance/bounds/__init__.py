"""Error bounds of a whole MoE, derived from the recipe and the case's own numbers; no picked tolerance."""

from conformance.bounds.accumulation import UNKNOWN
from conformance.bounds.allowance import Allowance, allowance_for
from conformance.bounds.band import judge_ideal
from conformance.bounds.judgement import Judgement, judge
from conformance.bounds.pooled import pooled

__all__ = ["UNKNOWN", "Allowance", "Judgement", "allowance_for", "judge", "judge_ideal", "pooled"]
