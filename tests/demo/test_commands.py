"""The commands of the demo work from a checkout, and an installed package says that it has no demo."""

from __future__ import annotations

import configparser
import json
import runpy
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep import cli

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_demo_is_not_installed() -> None:
    """``demo`` is the name of many a folder of users, and trying vlprep needs the Makefile of the checkout anyway."""
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    patterns = parser["options.packages.find"]["include"].split()
    assert any(fnmatch("prep", pattern) for pattern in patterns)
    assert not any(fnmatch("demo", pattern) for pattern in patterns)


@pytest.mark.slow
def test_the_command_finds_the_demo_of_its_checkout_from_any_folder(tmp_path: Path) -> None:
    """As after an editable install, which finds ``prep`` but not ``demo``."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import prep.cli; sys.path.pop(0);"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()];"
        "prep.cli.main()"
    )
    program = [sys.executable, "-c", code, str(REPOSITORY), "demo", "out", "--seed", "1"]
    result = subprocess.run(program, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("390 for training: ")
    assert len((tmp_path / "out" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()) == 80


def test_without_a_checkout_the_dataset_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "prep" / "cli.py"))
    result = CliRunner().invoke(cli.main, ["demo", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output == (
        "vlprep: the demo needs a checkout of the repository: it is not part of the installed package\n"
    )
    assert not (tmp_path / "out").exists()


class _NoDemo:
    """Finds no ``demo``, as after an installation."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "demo":
            raise ModuleNotFoundError("No module named 'demo'", name=name)


def test_without_a_checkout_the_tiny_checkpoint_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "demo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoDemo(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("train.tiny_model", run_name="__main__")
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: the tiny checkpoint needs a checkout of the repository: ")


def test_the_registry_names_the_files_that_the_command_writes() -> None:
    datasets = (REPOSITORY / "datasets.toml").read_text(encoding="utf-8")
    for name in ("annotations.jsonl", "heldout.jsonl"):
        assert f"annotation_path = {json.dumps(f'data/demo/{name}')}" in datasets
