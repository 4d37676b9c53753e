"""JSON Schema files for editors and other languages, generated from the structs.

``python -m schemas.json_schema`` writes them; a test fails when they differ from the structs.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec

from schemas.annotation import Problem, SampleRef
from schemas.manifest import Manifest
from schemas.records import Record, SharedFields
from schemas.setting import setting_fields
from schemas.settings import BuildSettings, MediaSettings

FOLDER = Path(__file__).parent / "json"

_TYPES: dict[str, Any] = {
    "manifest": Manifest,
    "problem": Problem,
    "samples": list[SampleRef],
}


def json_schemas() -> dict[str, bytes]:
    """Contents of every schema file by its name."""
    schemas: dict[str, dict[str, Any]] = {"annotation": _annotation_schema()}
    schemas |= {name: msgspec.json.schema(kind) for name, kind in _TYPES.items()}
    for settings_class in (BuildSettings, MediaSettings):
        properties = schemas["manifest"]["$defs"][settings_class.__name__]["properties"]
        for name, field in setting_fields(settings_class).items():
            properties[name]["description"] = field.setting.help
    return {f"{name}.schema.json": _encoded(schema) for name, schema in schemas.items()}


def _annotation_schema() -> dict[str, Any]:
    """Schema of a record. Turns may have either spelling, and some field must hold them."""
    schema = msgspec.json.schema(Record)
    turn = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("ConversationTurn", "Message")]}
    properties = schema["$defs"]["Record"]["properties"]
    for field in ("conversations", "messages"):
        next(kind for kind in properties[field]["anyOf"] if kind["type"] == "array")["items"] = turn
    return {**schema, "not": {"propertyNames": {"enum": [*SharedFields.__struct_fields__]}}}


def _encoded(schema: dict[str, Any]) -> bytes:
    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_cleaned(schema)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _cleaned(value: Any) -> Any:
    """The same with docstrings as Python 3.13 has them: their indentation removed."""
    if isinstance(value, dict):
        return {
            key: inspect.cleandoc(item) if key == "description" and isinstance(item, str) else _cleaned(item)
            for key, item in value.items()
        }
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, data in json_schemas().items():
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
