"""What test files share: torch in one thread, and under pytest-xdist the order of the files.

There a worker takes a file at a time, and those that take longest begin first. Else a worker ends with one of them,
while the others have nothing left to do: `--dist loadfile --no-loadscope-reorder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONGEST = [
    HERE / name
    for name in (
        "docs/test_vendors.py",
        "unit/test_kernels_interpreter.py",
        "suite/test_plugin.py",
        "zoo/test_score.py",
        "suite/test_ray.py",
        "unit/test_bounds.py",
        "suite/test_other_code.py",
        "unit/test_selection_judge.py",
        "suite/test_signals.py",
        "suite/test_isolation.py",
        "zoo/test_zoo_selection.py",
        "suite/test_gate.py",
        "suite/test_check_backend.py",
    )
]
"""Files that take half a minute or more beside another, in this order."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {path: number for number, path in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch, where tensors are small: its threads would wait for each other, on a busy machine for minutes."""
    import torch  # here, since most files of these tests do without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
