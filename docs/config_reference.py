"""Writes the tables of docs/configuration.md from the settings' own descriptions: `make config-reference`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.config.serve_options import FileOptions

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- tables, written by `make config-reference` -->", "<!-- end of the tables -->"
ARGS = "applications[0].args"
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}

Schema = dict[str, Any]


def written(page: str) -> str:
    """The page with its tables as they should be. Raises ValueError for a page without the marks around them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """A section for each mapping of a config file: its description, and a row for each key."""
    schema = FileOptions.model_json_schema()
    return "\n".join(_section("", schema, schema["$defs"]))


def undescribed() -> list[str]:
    """The keys that have no description."""
    return re.findall(r"^\| `(\w+)` .*\|  \|$", tables(), re.MULTILINE)


def _section(path: str, mapping: Schema, known: dict[str, Schema]) -> Iterator[str]:
    """The section of the mapping at this path, and those of the mappings in it."""
    yield f"### {f'`{path}`' if path else 'The file'}\n"
    yield " ".join(mapping["description"].split()) + "\n"
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    inner: list[tuple[str, Schema]] = []
    for key, field in _taken(mapping):
        if found := _mapping_in(field, known):
            place, target = found
            inner.append((_joined(path, key) + place, target))
            value = f"see [below](#{_anchor(inner[-1][0])})"
            meaning = field.get("description", target["description"])  # the schema has one that both share only once
        else:
            value, meaning = _value(field), field.get("description", "")
        yield f"| `{key}` | {value} | {_default(key, field, mapping)} | {meaning} |"
    yield ""
    for place, target in inner:
        yield from _section(place, target, known)


def _taken(mapping: Schema) -> Iterator[tuple[str, Schema]]:
    """The keys that may be set: those that are refused whatever their value can only be null."""
    return ((key, field) for key, field in mapping.get("properties", {}).items() if field.get("type") != "null")


def _mapping_in(field: Schema, known: dict[str, Schema]) -> tuple[str, Schema] | None:
    """The mapping that a key holds: itself, by a name, or in a list; with what that adds to its path."""
    for place, inner in (("", field), (".NAME", _values(field)), ("[0]", field.get("items", {}))):
        for option in inner.get("anyOf", [inner]):
            if "$ref" in option:
                return place, known[option["$ref"].rpartition("/")[2]]
    return None


def _values(field: Schema) -> Schema:
    """What a mapping with free names holds by each."""
    found: object = field.get("additionalProperties") or next(iter(field.get("patternProperties", {}).values()), {})
    return found if isinstance(found, dict) else {}


def _joined(path: str, key: str) -> str:
    """Dure's own settings are named from `args` on."""
    return key if path in ("", ARGS) else f"{path}.{key}"


def _value(field: Schema) -> str:
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    may_be_null = len(options) < len(field.get("anyOf", [])) and field.get("default") is not None
    return _shown(options[0]) + (", or `null`" if may_be_null else "")


def _shown(option: Schema) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if option["type"] == "array":
        return f"list of {_shown(option['items'])}"
    if option["type"] == "object":
        inner = _values(option)
        return f"mapping of {_shown(inner)}" if inner else "mapping"
    return KINDS[option["type"]] + _bounds(option)


def _bounds(option: Schema) -> str:
    if "exclusiveMinimum" in option:
        return f" over {_plain(option['exclusiveMinimum'])}, up to {_plain(option['maximum'])}"
    return f", {_plain(option['minimum'])} to {_plain(option['maximum'])}" if "minimum" in option else ""


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _default(key: str, field: Schema, mapping: Schema) -> str:
    if key in mapping.get("required", []):
        return "required"
    default = field.get("default")
    if isinstance(default, dict) and default:  # of a mapping in it
        return ""
    if default in (None, [], {}):
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _anchor(path: str) -> str:
    """As GitHub makes one of a heading."""
    return re.sub(r"[^a-z0-9_ -]", "", path.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
