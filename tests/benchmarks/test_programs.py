"""Benchmarks are programs outside the tests: each must at least find what it imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

PROGRAMS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "_")))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"tests.benchmarks.{name}")
