"""A page of sections, tables and texts as one HTML document, with its styles and scripts inside."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Section:
    """A heading with the pieces below it."""

    title: str
    pieces: Sequence[Markup]
    note: str = ""
    is_grid: bool = False
    """Whether the pieces stand side by side where there is room."""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the HTML document. Sections without pieces are left out."""
    assets = {
        name: Markup((ASSETS / file).read_text(encoding="utf-8"))
        for name, file in {
            "styles": "page.css",
            "script": "page.js",
            "uplot_styles": "uPlot.min.css",
            "uplot": "uPlot.iife.min.js",
            "uplot_license": "uPlot.LICENSE",
        }.items()
    }
    shown = [(f"section-{number}", section) for number, section in enumerate(sections, 1) if section.pieces]
    return _environment().get_template("page.html").render(title=title, subtitle=subtitle, sections=shown, **assets)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Return a table. Columns of numbers are right-aligned, with four significant digits; None is an empty cell."""
    cells = [[(_text(value), isinstance(value, int | float)) for value in row] for row in rows]
    heads = [(name, any(row[number][1] for row in cells)) for number, name in enumerate(columns)]
    return render("table", title=title, columns=heads, rows=cells)


def settings_table(title: str, values: Mapping[str, Any], *, is_open: bool = False) -> Markup:
    """Return nested settings as a table of dotted keys and values, which folds."""
    return render("settings", title=title, rows=list(_flat(values)), is_open=is_open)


def text(content: str) -> Markup:
    """Return a paragraph."""
    return render("paragraph", content=content)


def render(piece: str, **values: Any) -> Markup:
    """Return the HTML of a piece, one of the macros of `pieces.html`."""
    macro = getattr(_environment().get_template("pieces.html").module, piece)
    return Markup(macro(**values))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    numbers = itertools.count(1)
    environment.globals["next_id"] = lambda: f"piece-{next(numbers)}"
    return environment


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)
