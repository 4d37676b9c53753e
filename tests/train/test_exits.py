"""Every tool of the trainer ends with one sentence and the exit codes of the start page."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigError, ShardError
from train.exits import guarded, hide_library_output
from train.generate.cli import main as generate
from train.memory.cli import main as memory
from train.order.cli import main as order
from train.tools.merge import main as merge
from train.tools.summary import main as summary


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("no such folder."), 2, "error: no such folder."),
        (ShardError("damaged."), 1, "error: damaged."),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "page.html"),
            1,
            "error: page.html: No space left on device. Fix that and rerun the same command.",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(error: BaseException, code: int, sentence: str) -> None:
    @click.command()
    @guarded
    def fail() -> None:
        raise error

    result = CliRunner().invoke(fail)
    assert (result.exit_code, result.stderr) == (code, f"{sentence}\n")


def test_a_folder_that_is_not_there_is_wrong_use_in_every_tool(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for tool, words in (
        (generate, ["--model", nowhere, "--shards", nowhere]),
        (memory, ["--world-size", "1", "--shards", nowhere]),
        (order, ["--run", nowhere, "--step", "0"]),
        (order, ["--shards", nowhere, "--world-size", "1", "--global-batch", "1", "--step", "0"]),
        (merge, [nowhere, "--out", str(tmp_path / "out")]),
        (summary, [nowhere, nowhere]),
    ):
        result = CliRunner().invoke(tool, words)
        assert result.exit_code == 2, (tool.name, result.output)
        assert result.stderr.startswith("error: "), tool.name
        assert nowhere in result.stderr, tool.name


def test_tools_hide_progress_of_transformers_and_warnings_of_deepspeed_but_no_error() -> None:
    hide_library_output()
    logger = logging.getLogger("DeepSpeed")
    levels = (logging.WARNING, logging.ERROR)
    records = [logging.LogRecord("DeepSpeed", level, "", 0, "a message", None, None) for level in levels]
    assert [bool(logger.filter(record)) for record in records] == [False, True]
    assert not transformers_logging.is_progress_bar_enabled()
