"""`fp8moe show FOLDER [OTHER]`: a certificate as a page that people read, or two side by side; or as JUnit XML."""

from __future__ import annotations

from pathlib import Path

from conformance.certificate.page import comparison, is_page, page
from conformance.certificate.signing import CannotSign
from conformance.certificate.verifying import Verified, verify
from conformance.pages import PageUnavailable
from conformance.report_junit import of_certificate
from fp8moe.commands.files import check_folders, write_whole
from fp8moe.commands.question import BadInput


def show(
    folder: Path,
    other: Path | None,
    html: Path | None,
    key: Path | None,
    junit: Path | None = None,
    overwrite: bool = False,
) -> list[Verified]:
    """Writes the page, or JUnit XML, or both.

    Args:
        key: that the first must be signed with.
        junit: of the first alone.
        overwrite: whatever the page's file holds; else only an earlier page.

    Returns:
        Each as it was verified.

    Raises:
        BadInput: one that cannot be read as a certificate; a key that is none; jinja2 is missing; nothing to write;
            a file that is there already.
    """
    given = {"--html": html, "--junit": junit}
    files = {option: path for option, path in given.items() if path is not None}
    if not files:
        raise BadInput("give --html FILE, the page to write, or --junit FILE")
    if junit is not None and other is not None:
        raise BadInput(f"--junit {junit}: it is of one certificate; leave {other} out")
    check_folders(files)
    if html is not None and html.exists() and not overwrite and not is_page(html):
        raise BadInput(f"--html {html}: is there already, and no such page; name another, or give --overwrite")
    try:
        found = [verify(folder, key), *([] if other is None else [verify(other)])]
    except CannotSign as error:
        raise BadInput(str(error)) from None
    for each, where in zip(found, (folder, other), strict=False):
        if each.certificate is None:
            raise BadInput(f"{where}: no certificate that can be read: {each.findings[0]}")
    if html is not None:
        try:
            text = page(found[0]) if other is None else comparison(*found)
        except PageUnavailable as error:
            raise BadInput(f"--html: {error}") from None
        write_whole(html, text)
    if junit is not None:
        write_whole(junit, of_certificate(found[0]))
    return found
