"""JSON Schema files for editors and other languages, generated from the structs.

``python -m schemas.json_schema`` writes them anew; a test fails when they differ from the structs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from schemas.annotation import Annotation, Problem, SampleRef
from schemas.manifest import Manifest

FOLDER = Path(__file__).parent / "json"

_TYPES: dict[str, Any] = {
    "annotation": Annotation,
    "manifest": Manifest,
    "problem": Problem,
    "samples": list[SampleRef],
}


def json_schemas() -> dict[str, bytes]:
    """Contents of every schema file by its name."""
    files = {}
    for name, kind in _TYPES.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}
        files[f"{name}.schema.json"] = msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"
    return files


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, data in json_schemas().items():
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
