"""The selector's decisions over the whole declared grid, kept as rules in one file, and what changed since.

``watch`` sees which rule ends a selection, ``decided`` has every cell's outcome and rule, ``merging`` and ``boxes``
compress them, ``table`` is the list of rules, ``kept`` the file, ``changes`` the difference, ``review`` the check.
"""
