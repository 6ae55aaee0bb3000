"""Under pytest-xdist, where a worker takes a file at a time, those that take longest begin first.

Else a worker ends with one of them, while the others have nothing left to do: `--dist loadfile --no-loadscope-reorder`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONGEST = [
    HERE / name
    for name in (
        "docs/test_vendors.py",
        "unit/test_kernels_interpreter.py",
        "zoo/test_score.py",
        "suite/test_plugin.py",
        "suite/test_ray.py",
        "suite/test_signals.py",
        "suite/test_other_code.py",
        "suite/test_gate.py",
        "unit/test_selection_judge.py",
    )
]
"""Files that take a minute or more beside another, in this order."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {path: number for number, path in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
