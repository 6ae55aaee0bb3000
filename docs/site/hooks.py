"""What MkDocs asks of us: pages that lie elsewhere, and the parts of a page that are made from the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from parts import PARTS

ELSEWHERE = {"vendors.md": Path(__file__).parents[1] / "vendors.md"}
"""Pages that are read where they lie as well."""
INSERT = re.compile(r"^<!-- insert: (?P<name>[\w-]+)(?: (?P<argument>[^\n]+?))? -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return INSERT.sub(lambda found: inserted(found, page.file.src_uri), markdown)


def inserted(found: re.Match[str], page: str) -> str:
    """The text in the place of a line such as `<!-- insert: readme Three commands -->`.

    Raises:
        PluginError: there is no such part, or the part cannot be made.
    """
    name, argument = found["name"], found["argument"]
    if name not in PARTS:
        raise PluginError(f"{page}: <!-- insert: {name} -->: expected one of {', '.join(sorted(PARTS))}")
    try:
        return PARTS[name]() if argument is None else PARTS[name](argument)
    except (LookupError, TypeError, ValueError) as error:
        raise PluginError(f"{page}: {found[0]}: {type(error).__name__}: {error}") from error
