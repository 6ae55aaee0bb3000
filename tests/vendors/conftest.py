"""Puts the plug-in packages beside the tests on the import path, as an installation would."""

import sys
from pathlib import Path

for package in sorted(Path(__file__).parent.glob("*/pyproject.toml")):
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
