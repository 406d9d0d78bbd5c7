"""Write the generated pages of the documentation: python3 scripts/make_docs.py [FOLDER].

`commands.md` comes from the help texts of the command, `settings.md` from the config sections (`onevoice schema`).
A test fails when the pages in `docs/` differ from what this script writes.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onevoice.cli import app
from onevoice.config import json_schema
from onevoice.evaluation.run import EvaluationConfig
from onevoice.training.experiment import Experiment

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = "<!-- Written by scripts/make_docs.py. Edit the docstrings in the code, then run it again. -->\n\n"
RANGES = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SETTINGS = """# Settings

Every key of the config files, with its type, its default, and what it means. `onevoice schema` and
`onevoice schema eval` print the same as JSON Schema. An unknown key, a wrong type, or a value out of range is an error
that names the full path of the key and the nearest known one. `--set a.b.c=VALUE` overrides a key on the command line.
A key without a default is required.

"""

Schema = dict[str, Any]


def commands() -> str:
    """Return the page of the command line."""
    page = app.generate_docs(output_format="markdown", include_hidden=False)
    page = page.replace("][", "]\\[")  # options in brackets are no links
    page = re.sub(r"## Table of Contents\n.*?(?=\*\*|## )", "", page, flags=re.DOTALL)  # the site shows one
    return GENERATED + "# Command line\n\n" + page.split("\n", 1)[1].strip() + "\n"


def settings() -> str:
    """Return the page of the config files: first the experiment, then the evaluation."""
    pages = [
        ("Experiment", "What `onevoice train --config FILE` and `train.py --c FILE` read.", Experiment),
        ("Evaluation", "What `onevoice eval --config FILE` and `eval.py --c FILE` read.", EvaluationConfig),
    ]
    described: set[str] = set()
    blocks = [
        f"## {title}\n\n{text}\n\n" + "\n".join(sections(json_schema(kind), described)) for title, text, kind in pages
    ]
    return GENERATED + SETTINGS + "\n".join(blocks)


def sections(schema: Schema, described: set[str]) -> Iterator[str]:
    """Yield a table per section below `schema`, each section once, under all the paths that lead to it."""
    paths: dict[str, list[str]] = {}
    for path, name in walk(schema, schema["$defs"], ""):
        paths.setdefault(name, []).append(path)
    yield table(schema, schema["$defs"])
    for name, places in paths.items():
        if name not in described:
            described.add(name)
            yield heading(places, schema["$defs"][name])
            yield table(schema["$defs"][name], schema["$defs"])


def walk(section: Schema, definitions: Schema, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the name of every section below this one."""
    for key, value in section["properties"].items():
        for name in references(value):
            place = f"{path}.{key}".lstrip(".")
            yield place, name
            yield from walk(definitions[name], definitions, place)


def references(value: Schema) -> list[str]:
    """Return the names of the sections that a key can hold."""
    if "$ref" in value:
        return [value["$ref"].rpartition("/")[2]]
    return [name for kind in ("anyOf", "oneOf") for option in value.get(kind, []) for name in references(option)]


def heading(places: list[str], section: Schema) -> str:
    """Return the heading of a section: its paths, the word that selects it, and its description."""
    words = {key: value["const"] for key, value in section["properties"].items() if "const" in value}
    tags = [f'"{key}": "{word}"' for key, word in words.items() if key in ("kind", "name")]
    title = ", ".join(f"`{place}`" for place in dict.fromkeys(places)) + "".join(f" with `{tag}`" for tag in tags)
    return f"### {title}\n\n{one_line(section.get('description', ''))}\n"


def table(section: Schema, definitions: Schema) -> str:
    """Return a table of the keys of a section."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        required = key in section.get("required", [])
        default = "" if required or references(value) else f"`{json.dumps(value.get('default'), ensure_ascii=False)}`"
        cells = [f"`{key}`", kind_of(value), default, one_line(meaning(value, definitions))]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def meaning(value: Schema, definitions: Schema) -> str:
    """Return the description of a key."""
    if "description" in value:
        return str(value["description"])
    if "$ref" in value:  # pydantic omits a description that its section repeats
        return str(definitions[references(value)[0]].get("description", ""))
    return "selects this section" if "const" in value else ""


def kind_of(value: Schema) -> str:
    """Return the type of a value in words, with its range."""
    if "$ref" in value:
        return "section"
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(dict.fromkeys(kind_of(option) for option in value[union]))
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{json.dumps(word)}`" for word in value["enum"])
    if "prefixItems" in value:
        items = [kind_of(item) for item in value["prefixItems"]]
        return f"{len(items)} × {items[0]}" if len(set(items)) == 1 else f"[{', '.join(items)}]"
    if value.get("type") == "array":
        return f"list of {kind_of(value.get('items', {}))}"
    bounds = [f"{sign} {value[bound]}" for bound, sign in RANGES.items() if bound in value]
    return " ".join([value.get("type", "any"), ", ".join(bounds)]).strip()


def one_line(text: str) -> str:
    """Return a docstring on one line."""
    return " ".join(text.split())


PAGES = {"commands.md": commands, "settings.md": settings}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
        print(folder / name)
