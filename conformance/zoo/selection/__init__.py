"""Selectors broken on purpose, which the checks of selection must convict; `python -m conformance.zoo.selection`."""
