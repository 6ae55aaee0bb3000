"""`fp8moe show FOLDER [OTHER] --html FILE`: a certificate as a page that people read, or two side by side."""

from __future__ import annotations

from pathlib import Path

from conformance.certificate.page import comparison, page
from conformance.certificate.signing import CannotSign
from conformance.certificate.verifying import Verified, verify
from conformance.pages import PageUnavailable
from fp8moe.commands.files import check_folders, write_whole
from fp8moe.commands.question import BadInput


def show(folder: Path, other: Path | None, html: Path, key: Path | None) -> list[Verified]:
    """Writes the page.

    Args:
        key: that the first must be signed with.

    Returns:
        Each as it was verified.

    Raises:
        BadInput: one that cannot be read as a certificate; a key that is none; jinja2 is missing.
    """
    check_folders({"--html": html})
    try:
        found = [verify(folder, key), *([] if other is None else [verify(other)])]
    except CannotSign as error:
        raise BadInput(str(error)) from None
    for each, where in zip(found, (folder, other), strict=False):
        if each.certificate is None:
            raise BadInput(f"{where}: no certificate that can be read: {each.findings[0]}")
    try:
        text = page(found[0]) if other is None else comparison(*found)
    except PageUnavailable as error:
        raise BadInput(f"--html: {error}") from None
    write_whole(html, text)
    return found
