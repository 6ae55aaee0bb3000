"""The conformance suite: what is selected, and whether it computes what it claims; `pytest conformance` runs it."""
