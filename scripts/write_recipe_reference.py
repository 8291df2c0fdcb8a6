"""Write the recipe reference and the reference of `--json`.

docs/recipe.md and docs/schemas/recipe.json come from the schema's dataclasses, their comments and the comments of
`configs/_base.yaml`. docs/json.md comes from docs/schemas/output.json.

    python scripts/write_recipe_reference.py [--check]

With --check, write nothing, and fail if a file differs from what the code gives.
"""

import inspect
import json
import math
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from reference import write_or_check

from pgprune_cli.recipe.reader import shipped_folder
from pgprune_cli.recipe.schema import Range, Recipe
from pgprune_cli.recipe.strict_yaml import choice_text, to_yaml
from pgprune_cli.recipe.text import comments

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN = "Written by `make references`; do not edit."
INTRODUCTION = """\
`pgprune recipes show NAME` prints a recipe with every key filled in, and `pgprune recipes copy NAME` copies one into a
file to edit. The *default* applies if a recipe does not set the key. The shipped recipes extend `_base`, which sets
some keys to other values. The [JSON Schema](schemas/recipe.json) lets editors complete and check a recipe; pgprune's
own reader checks more."""
JSON_INTRODUCTION = """\
With `--json`, every command prints one JSON object on stdout; progress and errors go to stderr. The
[schema](schemas/output.json) is a JSON Schema with a definition for each command under `$defs`, and the tests validate
what every command prints against it. Numbers that are not finite are null. `pgprune recipes show --json` prints a
[recipe](recipe.md)."""
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a key's annotation, or of a section."""
    if is_dataclass(kind):
        known = descriptions(kind)
        properties = {}
        for entry in fields(kind):
            description = {"description": known[entry.name]} if entry.name in known else {}
            properties[entry.name] = schema_of(entry.type) | _default(entry) | description
        return {"type": "object", "additionalProperties": False, "properties": properties}
    if get_origin(kind) is Annotated:
        inner, check = get_args(kind)
        return schema_of(inner) | (_range(check) if isinstance(check, Range) else {})
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": "array", "minItems": 1, "uniqueItems": True, "items": schema_of(get_args(kind)[0])}
    return {"type": PLAIN[kind]}


def _range(check: Range) -> dict[str, float]:
    limits = {"exclusiveMinimum" if check.above else "minimum": check.low}
    return limits if math.isinf(check.high) else limits | {"exclusiveMaximum": check.high}


def _default(entry: Field[Any]) -> dict[str, Any]:
    if entry.default is MISSING or is_dataclass(entry.default):
        return {}
    return {"default": list(entry.default) if isinstance(entry.default, tuple) else entry.default}


def values_of(kind: Any) -> str:
    """What a key may be, in words."""
    if get_origin(kind) is Annotated:
        inner, check = get_args(kind)
        if not isinstance(check, Range):
            return values_of(inner)
        low = f"{'>' if check.above else '≥'} {check.low}"
        return f"{values_of(inner)} {low}" + ("" if math.isinf(check.high) else f", < {check.high}")
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice_text(choice)}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of: {values_of(get_args(kind)[0])}"
    if kind is bool:
        return "`true`, `false`"
    return PLAIN[kind].replace("string", "text")


def recipe_page() -> str:
    """A table for each section of a recipe."""
    base = yaml.safe_load((shipped_folder() / "_base.yaml").read_text(encoding="utf-8"))
    lines = ["# Recipe reference", "", WRITTEN, "", f"{inspect.getdoc(Recipe)}", "", INTRODUCTION, ""]
    lines += _table("", Recipe, base)
    for entry in fields(Recipe):
        if is_dataclass(entry.type):
            lines += ["", f"## {entry.name}", "", inspect.getdoc(entry.type) or "", ""]
            lines += _table(f"{entry.name}.", entry.type, base.get(entry.name, {}))
    return "\n".join(lines) + "\n"


def _table(prefix: str, section: Any, base: dict[str, Any]) -> list[str]:
    """The keys of one section: their values, their default, and what is said of them in the schema and in `_base`."""
    known = comments()
    said = descriptions(section)
    lines = ["| key | values | default | description | note in `_base.yaml` |", "|---|---|---|---|---|"]
    for entry in fields(section):
        if not is_dataclass(entry.type):
            cells = [f"`{entry.name}`", values_of(entry.type), _defaults(entry, base)]
            cells += [said.get(entry.name, ""), known.get(prefix + entry.name, "")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def descriptions(section: Any) -> dict[str, str]:
    """Return the description of every key of a section: the comment lines above it."""
    matches = re.findall(r"((?:^    # .*\n)+)    (\w+): ", inspect.getsource(section), re.MULTILINE)
    return {key: " ".join(line.strip().removeprefix("# ") for line in lines.splitlines()) for lines, key in matches}


def _defaults(entry: Field[Any], base: dict[str, Any]) -> str:
    """The schema's default, and that of the recipes that ship where it is another."""
    if entry.default is MISSING:
        return f"required; `{base[entry.name]}` in `_base`" if entry.name in base else "required"
    default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    shipped = base.get(entry.name, default)
    return _code(default) + ("" if shipped == default else f"; {_code(shipped)} in `_base`")


def _code(value: Any) -> str:
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, list) else f"`{to_yaml(value)}`"


def json_page() -> str:
    """A table for each object that `--json` prints, from its schema."""
    schema = json.loads((DOCS / "schemas" / "output.json").read_text(encoding="utf-8"))
    lines = ["# JSON output", "", WRITTEN, "", JSON_INTRODUCTION]
    for name, kind in schema["$defs"].items():
        if "properties" in kind:
            lines += ["", f"## {name}", "", "| key | type | what it is |", "|---|---|---|"]
            lines += [
                _json_row(key, value, key in kind["required"], schema) for key, value in kind["properties"].items()
            ]
    return "\n".join(lines) + "\n"


def _json_row(key: str, value: dict[str, Any], required: bool, schema: dict[str, Any]) -> str:
    said = value.get("description") or _named(value, schema).get("description", "")
    return f"| `{key}`{'' if required else ' (not always)'} | {_json_type(value, schema)} | {said} |"


def _json_type(value: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in value and _named(value, schema)["type"] == "object":
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    value = _named(value, schema) | value
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if value["type"] == "array":
        return f"list of {_json_type(value['items'], schema)}"
    return " or ".join([value["type"]] if isinstance(value["type"], str) else value["type"])


def _named(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else {}


def pages() -> dict[Path, str]:
    """What is written, by file."""
    recipe: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of pgprune"}
    recipe |= schema_of(Recipe)
    recipe["properties"] = {"extends": {"type": "string", "description": "another recipe"}} | recipe["properties"]
    return {
        DOCS / "recipe.md": recipe_page(),
        DOCS / "schemas" / "recipe.json": json.dumps(recipe, indent=2, ensure_ascii=False) + "\n",
        DOCS / "json.md": json_page(),
    }


if __name__ == "__main__":
    write_or_check(pages(), "the code")
