"""GPU memory grows in expandable segments, unless the environment configures the allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest

from train.main import ALLOCATOR_VARIABLES, main


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The allocator's variables when a run starts; nothing is trained."""
    records: list[dict[str, str]] = []

    def train(*_: object) -> bool:
        records.append({name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ})
        return True

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the variable is restored, whoever sets it
        monkeypatch.delenv(name)
    for module, name in (("train.run.loop", "train"), ("train.preflight.dry_run", "preflight")):
        stub = ModuleType(module)
        setattr(stub, name, train)
        monkeypatch.setitem(sys.modules, module, stub)
    return records


def test_a_run_uses_expandable_segments(seen: list[dict[str, str]]) -> None:
    assert main(["--shards", "shards"]) == 0
    assert seen == [{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_settings_of_the_environment_have_precedence(
    name: str, seen: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    assert main(["--shards", "shards"]) == 0
    assert seen == [{name: "max_split_size_mb:512"}]


def test_torch_is_not_imported_before_the_allocator_is_configured() -> None:
    program = "import sys, train.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
