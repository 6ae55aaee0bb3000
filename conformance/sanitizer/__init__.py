"""Chosen cases under NVIDIA's compute-sanitizer: what it finds in memory and in the order of threads is their result.

Equal bits do not show that a kernel keeps to its own memory: a load past the end of a tensor whose value is multiplied
by zero changes no output until the page behind it is not there.
"""

from conformance.sanitizer.lane import chosen_cases, sanitize
from conformance.sanitizer.tool import TOOLS, SanitizerMissing, located

__all__ = ["TOOLS", "SanitizerMissing", "chosen_cases", "located", "sanitize"]
