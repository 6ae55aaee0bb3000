"""Puts the plug-in packages beside the tests on the import path, as an installation would."""

import sys
from pathlib import Path

collect_ignore = ["toy-vendor"]
"""Its own tests run where its wheel is installed: `test_toy_vendor.py`."""

for package in sorted(Path(__file__).parent.glob("fp8moe-*/pyproject.toml")):
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
