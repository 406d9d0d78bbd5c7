"""Reads a page: its headings, tables, charts and players, without a browser."""

import base64
import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """The content of a page, and every address that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.charts: dict[str, Any] = {}
        self.players: dict[str, dict[str, dict[str, str]]] = {}
        self.addresses: list[str] = []
        self.text = ""
        self._stack: list[str] = []
        self._json = self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in ("src", "href", "data", "action") if name in values]
        classes = values.get("class", "").split()
        if tag in ("meta", "link", "input", "img"):
            if tag == "img":
                self._track["image"] = values["src"]
                self._track["alt"] = values["alt"]
            return
        self._stack.append(tag)
        if "table" in classes:
            self._rows = self.tables.setdefault(values["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif "players" in classes:
            self._group: dict[str, dict[str, str]] = {}
        elif "track" in classes:
            self._track: dict[str, str] = {"seconds": values["data-seconds"], "aligned": values["data-aligned"]}
        elif tag == "audio":
            self._track["audio"] = values["src"]
            self._group[values["aria-label"]] = self._track
        elif tag == "script":
            self._json = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._json.strip().startswith("{") and self._caption:
            self.charts[self._caption] = json.loads(self._json)
            self._caption = ""
        if self._stack and self._stack[-1] == tag:
            self._stack.pop()

    def handle_data(self, data: str) -> None:
        tag = self._stack[-1] if self._stack else ""
        if tag == "script":
            self._json += data
            return
        self.text += data
        if tag in ("h1", "h2", "h3"):
            self.titles.append(data)
            if tag == "h3":
                self.players[data] = self._group
        elif tag == "figcaption":
            self._caption = data
        elif tag in ("td", "th"):
            self._rows[-1][-1] += data


def decode(uri: str) -> bytes:
    """The content of a data URI."""
    return base64.b64decode(uri.partition(",")[2])
