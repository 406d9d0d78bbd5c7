"""Configurations: JSON on disk, frozen dataclasses in memory, one definition of every default.

Each module defines its own section as `@dataclass(frozen=True, config=STRICT)` beside the code that reads it. A
docstring under a field becomes its description in the JSON Schema; pydantic reads only the class's own fields, so a
section repeats the fields it shares with another one instead of inheriting them. For numbers, use pydantic's own
types (`PositiveInt`, `PositiveFloat`, `NonNegativeInt`, `NonNegativeFloat`) and the two types below.

This module reads, checks, overrides and describes any section. An unknown key, a wrong type or a value out of range
raises `ConfigError` with the full path of the key, and for a misspelled key the nearest key that exists.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, TypeAdapter, ValidationError

from onevoice.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
"""The pydantic settings of every section: no unknown keys, no silent conversions, described by its docstrings."""


def require_rising(bounds: tuple[int | float, int | float]) -> tuple[int | float, int | float]:
    """Return the lowest and highest value of a range unchanged; raise `ValueError` unless low ≤ high."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lowest value {bounds[0]:g} is above the highest {bounds[1]:g}")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share or a probability, from 0 to 1."""

PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(require_rising)]
"""The lowest and the highest value of a positive quantity."""


class FreeOnResume:
    """Marks a field that a resumed run may change: `field: Annotated[int, FREE]`. All other fields must stay."""


FREE = FreeOnResume()

Location = Annotated[str, FREE]
"""A file or folder, which may have moved when a run resumes."""

Section = TypeVar("Section")
Json = dict[str, Any]


def load_config(kind: type[Section], path: str | Path, overrides: Sequence[str] = ()) -> Section:
    """Read the section `kind` from a JSON file, after applying `overrides` of the form `a.b.c=value`.

    Raises `ConfigError` for a missing file, invalid JSON, or values that do not fit.
    """
    return from_dict(kind, override(read_config(path), overrides), name=str(path))


def read_config(path: str | Path) -> Json:
    """Return the JSON object in a file; raises `ConfigError` for a missing file, invalid JSON or another value."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not a {type(values).__name__}")
    refuse_nul(values, str(path))
    return values


def refuse_nul(values: Json, name: str) -> None:
    """Raise `ConfigError` if a string has the character NUL, which no name of a file can have."""
    if "\\u0000" in json.dumps(values):
        raise ConfigError(f"{name}: a string has the character NUL (\\u0000); remove it")


def from_dict(kind: type[Section], values: object, name: str = "config") -> Section:
    """Build the section `kind` from plain JSON values and check all of them; error messages start with `name`.

    If the section has a static method `upgrade`, it rewrites the values of earlier versions first.
    """
    upgrade = getattr(kind, "upgrade", None)
    values = upgrade(values) if upgrade is not None and isinstance(values, Mapping) else values
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except OverflowError as error:  # of a check in a section
        raise ConfigError(f"{name}: a number is too large ({error})") from error
    except ValidationError as error:
        problems = "; ".join(_explain(kind, item) for item in error.errors(include_url=False))
        raise ConfigError(f"{name}: {problems}") from error


def to_dict(section: Any) -> Json:
    """Return a section as plain JSON values, from which `from_dict` builds it again."""
    return typing.cast(Json, TypeAdapter(type(section)).dump_python(section, mode="json"))


def json_schema(kind: type[Any]) -> Json:
    """Return the JSON Schema of a section, with defaults and descriptions."""
    return TypeAdapter(kind).json_schema()


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> Json:
    """Return `values` with each `a.b.c=value` set; a value that is not JSON is taken as a string."""
    result: Json = json.loads(json.dumps(values))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: write it as key=value, for example --set training.epochs=3")
        *parents, last = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item}: {parent} is a value, not a section")
        try:
            node[last] = json.loads(text)
        except ValueError:
            node[last] = text
    return result


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} appears twice")
    return dict(pairs)


def _explain(kind: type[Any], item: Any) -> str:
    """Return one of pydantic's errors in our words: the full path of the key, and what is wrong with it."""
    is_unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    place, keys = _follow(kind, item["loc"][:-1] if is_unknown else item["loc"])
    path = ".".join(str(part) for part in [*place, *(item["loc"][-1:] if is_unknown else ())]) or "(top level)"
    context = item.get("ctx", {})
    if is_unknown:
        nearest = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(keys)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{path}: is required and missing"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        if not isinstance(item["input"], dict):
            return f"{path}: input should be an object, not {json.dumps(item['input'])}"
        key = context["discriminator"].strip("'").removesuffix("()")  # the key, or a function named after it
        path = f"{path}.{key}" if key in keys else path
        if "tag" not in context:
            return f"{path}: is required and missing"
        return f"{path}: input should be one of {context['expected_tags']}, not {json.dumps(context['tag'])}"
    if item["type"] == "value_error":
        return f"{path}: {context['error']}"
    given = "" if isinstance(item["input"], dict | list) else f", not {json.dumps(item['input'], default=str)}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{path}: {message}{given}"


def _follow(kind: Any, place: Sequence[str | int]) -> tuple[list[str | int], list[str]]:
    """Return an error's place below `kind` without pydantic's tags for union members, and the known keys there."""
    options, path = [kind], []
    for part in place:
        tagged = [option for option in options if part in _tags(option)] if len(options) > 1 else []
        if tagged:
            options = tagged
            continue
        found = [hint for option in options for name, hint in typing.get_type_hints(option).items() if name == part]
        if found or isinstance(part, int):
            path.append(part)
            options = [section for hint in found for section in _sections(hint)] or options
    return path, [field.name for option in options for field in dataclasses.fields(option)]


def _tags(section: Any) -> list[Any]:
    """Return the words that tell a section from the other members of a union."""
    hints = typing.get_type_hints(section).values()
    return [word for hint in hints if typing.get_origin(hint) is typing.Literal for word in typing.get_args(hint)]


def _sections(hint: Any) -> list[Any]:
    """Return the dataclasses that a type hint admits, through unions, containers and annotations."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [section for argument in typing.get_args(hint) for section in _sections(argument)]
