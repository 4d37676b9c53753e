"""Registries of other trainers -> tables of ``datasets.toml``. Python is parsed, never run."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.migrate.launch import ScriptError, read_file

_LLAMA_FACTORY_KEYS = {"file_name", "formatting", "columns", "tags"}
_COLUMNS = {
    "messages": ("messages", "conversations"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "system": ("system",),
    "tools": ("tools",),
    "prompt": ("instruction",),
    "query": ("input",),
    "response": ("output",),
    "history": ("history",),
}
"""Columns of LLaMA-Factory, and the fields that hold them in annotations."""

_MAX_LENGTH = 1 << 16
"""Bound on a text that is joined from others: each can hold the one before twice."""

_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}


@dataclass(frozen=True, slots=True)
class _Code:
    """Stands for a key or value that is code, which is not run."""

    text: str


@dataclass(kw_only=True, slots=True)
class Tables:
    """Datasets of a registry.

    Attributes:
        datasets: the keys of the table of each dataset.
        not_understood: what could not be read, a sentence each.
    """

    datasets: dict[str, dict[str, str | float]] = field(default_factory=dict)
    not_understood: list[str] = field(default_factory=list)

    def text(self, names: Iterable[str]) -> str:
        """The tables of some datasets as TOML."""
        blocks = []
        for name in names:
            lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in self.datasets[name].items()]
            key = name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
            blocks.append("\n".join([f"[{key}]", *lines]))
        return "\n\n".join(blocks)


def read_registry(path: Path, *, media_dir: str | None = None) -> Tables:
    """Read a registry: ``data/__init__.py`` of the upstream framework, or ``dataset_info.json`` of LLaMA-Factory.

    Args:
        path: the file.
        media_dir: folder of the media, for LLaMA-Factory.

    Raises:
        ScriptError: the file is no registry.
        ConfigError: there is no such file.
    """
    try:
        text = read_file(path)
        if path.suffix == ".py":
            return _read_python(ast.parse(text), path)
        return _read_dataset_info(json.loads(text), path, media_dir)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
        raise ScriptError(f"{path} cannot be read as a registry of datasets: {error}.") from error


def _read_python(module: ast.Module, path: Path) -> Tables:
    tables = Tables()
    values: dict[str, Any] = {}
    for node in module.body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef)) or _is_text(node) or _is_for_programs(node):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            code = " ".join(ast.unparse(node).split())
            tables.not_understood.append(f"{path}:{node.lineno}: code that is not run here: {code[:60]}")
            continue
        try:
            values[target.id] = _evaluate(node.value, values)
        except ValueError as error:
            tables.not_understood.append(f"{path}:{node.lineno}: {target.id} needs code that is not run here: {error}")
    registered = values.get("data_dict")
    if not isinstance(registered, dict):
        tables.not_understood.append(f"{path}: no data_dict, which lists the datasets")
        return tables
    for name, entry in registered.items():
        if isinstance(name, _Code):
            tables.not_understood.append(f"{path}: entries of data_dict need code that is not run here: {name.text}")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation_path"), str):
            tables.not_understood.append(f"{path}: the dataset {name} has no annotation_path that can be read")
            continue
        table: dict[str, str | float] = {"annotation_path": entry["annotation_path"]}
        media_root = entry.get("data_path")
        if isinstance(media_root, str) and media_root:
            table["media_root"] = media_root
        rate = entry.get("sampling_rate")
        if isinstance(rate, (int, float)) and math.isfinite(rate):
            table["sampling_rate"] = float(rate)
        unread = [key for key in entry if key != "data_path" and key not in table]
        unread += ["data_path"] if media_root and "media_root" not in table else []
        for key in unread:
            text = key.text if isinstance(key, _Code) else key
            tables.not_understood.append(f"{path}: {text} of the dataset {name}")
        tables.datasets[str(name)] = table
    return tables


def _is_for_programs(node: ast.stmt) -> bool:
    """Whether a statement is ``if __name__ == "__main__"``, which an import skips."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _evaluate(node: ast.expr, values: dict[str, Any]) -> Any:
    """The value of a literal, of a name assigned before, or of texts joined by ``+`` or in an f-string.

    Raises:
        ValueError: it needs code. The message is that code.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.Dict):
        return _entries(node, values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _evaluate(node.left, values), _evaluate(node.right, values)
        if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) <= _MAX_LENGTH:
            return left + right
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
        inserted = [_evaluate(part, values) for part in parts]
        # A dictionary can hold the one before twice, so its text may grow without bound.
        texts = [str(value) for value in inserted if isinstance(value, (str, int, float))]
        if len(texts) == len(inserted) and sum(map(len, texts)) <= _MAX_LENGTH:
            return "".join(texts)
    raise ValueError(ast.unparse(node)[:60])


def _entries(node: ast.Dict, values: dict[str, Any]) -> dict[Any, Any]:
    """The entries of a dictionary, with :class:`_Code` for what needs code."""
    items: dict[Any, Any] = {}
    for key, value in zip(node.keys, node.values):
        try:
            evaluated = _evaluate(value, values)
        except ValueError as error:
            evaluated = _Code(str(error))
        if isinstance(key, ast.Constant):
            items[key.value] = evaluated
        elif key is None and isinstance(evaluated, dict):
            items.update(evaluated)
        else:
            code = f"**{ast.unparse(value)}" if key is None else ast.unparse(key)
            items[_Code(code[:60])] = evaluated
    return items


def _read_dataset_info(info: Any, path: Path, media_dir: str | None) -> Tables:
    if not isinstance(info, dict):
        raise ValueError("a JSON object is expected")
    tables = Tables()
    for name, entry in info.items():
        problem = _problem_of(entry)
        if problem:
            tables.not_understood.append(f"{path}: the dataset {name} {problem}")
            continue
        tables.datasets[name] = {
            "annotation_path": str(path.parent / entry["file_name"]),
            "media_root": media_dir or str(path.parent),
        }
    return tables


def _problem_of(entry: Any) -> str:
    """Why a dataset of LLaMA-Factory cannot be registered; empty if it can."""
    if not isinstance(entry, dict):
        return "is no JSON object"
    if not isinstance(entry.get("file_name"), str):
        return "has no file_name: download it and register its annotation file"
    for key, value in entry.items():
        if key not in _LLAMA_FACTORY_KEYS and not (key == "ranking" and value is False):
            return f"has {key} = {json.dumps(value)}, which is not supported here"
    for kind, known in (("columns", _COLUMNS), ("tags", _TAGS)):
        renamed = entry.get(kind) or {}
        if not isinstance(renamed, dict):
            return f"has {kind} that are no JSON object"
        for key, value in renamed.items():
            if value not in known.get(key, ()):
                return f"has {kind}.{key} = {json.dumps(value)}: rename the field in its records"
    return ""
