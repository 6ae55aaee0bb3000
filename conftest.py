"""Makes `pytest` work from a checkout that is not installed, and does nothing else."""

import sys
from pathlib import Path

CHECKOUT = str(Path(__file__).parent)

if CHECKOUT not in sys.path:
    sys.path.append(CHECKOUT)  # last, so that an installed fp8moe is the one that gets tested

# The entry point of an installed fp8moe has this same name. pytest loads entry points first and keeps plug-ins by name,
# so the line below finds it there and adds nothing; after `-p no:conformance.plugin` it adds nothing either.
pytest_plugins = ["conformance.plugin"]
