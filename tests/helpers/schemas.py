"""The documented JSON schemas of the output of `--json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
SCHEMAS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
REGISTRY: Registry = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)


def validate(command: str, value: Any) -> None:
    """Raise jsonschema's ValidationError if an object does not match the schema of a command."""
    assert command in SCHEMAS["output.json"]["$defs"], f"docs/schemas/output.json has no definition of `{command}`"
    pointer = command.replace(" ", "%20")
    Draft202012Validator({"$ref": f"output.json#/$defs/{pointer}"}, registry=REGISTRY).validate(value)
