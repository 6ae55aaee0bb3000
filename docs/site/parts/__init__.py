"""The parts of the site that are made from the code, by the name that `<!-- insert: NAME -->` gives on a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from parts import backends, bounds, options, output, readme, report, rules, score, support, variables

MADE: tuple[Callable[..., str], ...] = (
    *(rules.rules, rules.rules_at_work, rules.reasons, rules.variables_at_work),
    *(backends.order, backends.orders_by_device, backends.choices_by_device, backends.backends),
    *(variables.selector_variables, variables.other_variables),
    *(options.commands, options.statuses, options.pytest_options, options.pytest_markers),
    *(score.kill_scores, score.kill_scores_by_family, score.known_survivors),
    *(bounds.accumulation_example, bounds.element_example, bounds.statistics_example),
    *(bounds.constants, bounds.undeclared),
    *(report.results, report.evidence, report.ratios, report.proven, report.not_proven),
    support.support_matrix,
    output.output,
    *(readme.readme, readme.introduction),
)
PARTS: Mapping[str, Callable[..., str]] = {part.__name__.replace("_", "-"): part for part in MADE}
