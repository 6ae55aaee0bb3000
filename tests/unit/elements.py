"""The elements of a page, for tests of what is on it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "base", "source"}


class Elements(HTMLParser):
    """The page's elements: which there are, whether each is closed, all attributes, and all text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes = list[str](), list[str](), list[tuple[str, str]]()
        self.texts, self.rows = list[str](), list[str]()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
            if self.open[-2:] == ["th", "code"]:
                self.rows.append(data)
