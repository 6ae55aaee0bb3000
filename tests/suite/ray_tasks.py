"""What runs in a Ray task in tests: a shard, and before it a line that says which and where."""

from __future__ import annotations

import os
from typing import Any

from conformance.on_ray import Asked, run_piece

STARTS, NODE = "FP8MOE_TEST_STARTS", "FP8MOE_TEST_NODE"
"""Variables of a node: the file with a line for each task that was begun, the node's name in it."""


def told_piece(asked: Asked, shard: str, before: str) -> dict[str, Any]:
    with open(os.environ[STARTS], "a", encoding="utf-8") as file:
        file.write(f"{shard or 'whole'} {os.environ[NODE]}\n")
    return run_piece(asked, shard, before)
