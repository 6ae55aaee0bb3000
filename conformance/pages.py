"""What all of the project's HTML pages share: the templates' environment, which escapes whatever is filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8moe.texts import visible

if TYPE_CHECKING:
    import jinja2


class PageUnavailable(RuntimeError):
    """jinja2, with which pages are written, is not installed."""


def environment(*packages: str) -> jinja2.Environment:
    """
    Args:
        packages: each with a folder `templates`; of two templates of one name, that of the earlier package.

    Raises:
        PageUnavailable: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError:
        raise PageUnavailable("the HTML page needs jinja2: pip install fp8moe[report]") from None
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What no reader sees is shown as its escape here as elsewhere, whatever field it comes in.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
