"""In a terminal, Ctrl-C reaches the ranks of `deepspeed` and not the launcher, whatever else is typed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.train.pseudo_terminal import CTRL_BACKSLASH, CTRL_C, CTRL_Z, HELPER, Shell, helper_of, shell_in_terminal

LAUNCH = shlex.join([sys.executable, str(Path(__file__).with_name("fake_ranks.py"))])
SCRIPT = f"{LAUNCH}; echo ended with $?; sleep 0.3; read line; echo read: $line"
"""A script that goes on to read the terminal, which only a command in the foreground can.

The real `deepspeed` ends long after the process that starts its ranks; on a busy machine, the helper needs a moment.
"""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with shell_in_terminal(tmp_path, os.environ) as shell:
        yield shell


def started_ranks(shell: Shell) -> list[psutil.Process]:
    """Both ranks, once they count what is pressed."""
    ranks = {}
    for _ in range(2):
        started = shell.wait_for(r"<rank (\d) = (\d+)>")
        ranks[started[1]] = psutil.Process(int(started[2]))
    return [ranks["0"], ranks["1"]]


def ranks_with_keys(shell: Shell) -> list[psutil.Process]:
    """Both ranks, once their helper has the foreground."""
    ranks = started_ranks(shell)
    shell.wait_until(lambda: helper_of(shell))
    return ranks


def helpers_of(ranks: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that were started to pass keys on to ranks."""
    helpers = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if HELPER in words and str(ranks[0].pid) in words[-2].split(","):
            helpers.append(process)
    return helpers


def ranks_without_keys(shell: Shell) -> list[psutil.Process]:
    """Both ranks, after a time in which a helper would have taken the foreground."""
    ranks = started_ranks(shell)
    time.sleep(1)
    assert shell.foreground == os.getpgid(ranks[0].pid)
    return ranks


def press_twice(shell: Shell) -> None:
    for count in (1, 2):
        shell.type(CTRL_C)
        for _ in range(2):
            shell.wait_for(rf"<rank \d: {count} of 2>")


def test_ctrl_c_reaches_the_ranks_alone_and_a_script_gets_their_exit_code_and_the_terminal(shell: Shell) -> None:
    shell.run("bash", "-c", f"{SCRIPT}")
    ranks_with_keys(shell)
    press_twice(shell)
    shell.wait_for("ended with 85\n")
    shell.type("some words\n")
    shell.wait_for("read: some words\nexit code: 0\n")


@pytest.mark.parametrize("command", [shlex.split(LAUNCH), ["bash", "-c", SCRIPT]], ids=["alone", "script"])
def test_ctrl_c_after_the_ranks_have_ended_leaves_the_launcher_its_exit_code(shell: Shell, command: list[str]) -> None:
    shell.run(*command)
    ranks = ranks_with_keys(shell)
    press_twice(shell)
    shell.wait_until(lambda: not any(rank.is_running() for rank in ranks))
    shell.type(CTRL_C)
    shown = shell.wait_for(r"(?s).*(exit code:|ended with) 85\n")[0]
    assert "KeyboardInterrupt" not in shown


def test_ctrl_z_stops_the_launch_and_fg_continues_it(shell: Shell) -> None:
    shell.run(*shlex.split(LAUNCH))
    ranks = ranks_with_keys(shell)
    (helper,) = helpers_of(ranks)
    shell.type(CTRL_Z)
    shell.wait_for(f"exit code: {128 + signal.SIGTSTP}\n")
    shell.wait_until(lambda: [process.status() for process in (*ranks, helper)] == [psutil.STATUS_STOPPED] * 3)
    shell.type("fg\n")
    shell.wait_until(lambda: shell.foreground == helper.pid)
    press_twice(shell)


def test_ctrl_backslash_ends_all(shell: Shell) -> None:
    shell.run(*shlex.split(LAUNCH))
    ranks = ranks_with_keys(shell)
    shell.type(CTRL_BACKSLASH)
    shell.wait_for(f"exit code: {128 + signal.SIGQUIT}")
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def test_a_killed_rank_leaves_the_terminal_to_the_script(shell: Shell) -> None:
    shell.run("bash", "-c", SCRIPT)
    ranks = ranks_with_keys(shell)
    for rank in ranks:
        rank.kill()
    shell.wait_for("ended with")
    shell.type("some words\n")
    shell.wait_for("read: some words\nexit code: 0\n")


def test_closing_the_terminal_ends_the_ranks(tmp_path: Path) -> None:
    with shell_in_terminal(tmp_path, os.environ) as shell:
        shell.run("bash", "-c", SCRIPT)
        ranks = ranks_with_keys(shell)
        helpers = helpers_of(ranks)
    assert len(helpers) == 1
    assert psutil.wait_procs([*ranks, *helpers], timeout=60)[1] == []


@pytest.mark.parametrize("before", ["stty -icanon", "stty tostop"])
def test_the_terminal_is_left_alone_where_another_program_reads_keys_or_the_ranks_could_not_write(
    shell: Shell, before: str
) -> None:
    shell.run("bash", "-c", f"{before}; {LAUNCH}")
    ranks_without_keys(shell)
    shell.type(CTRL_C)
    shell.wait_for(re.escape("KeyboardInterrupt"))


def test_a_background_job_of_a_script_leaves_the_terminal_alone(shell: Shell) -> None:
    shell.run("bash", "-c", f"{LAUNCH} & wait")
    ranks = ranks_without_keys(shell)
    assert helpers_of(ranks) == []


def test_the_trainer_goes_on_after_the_end_of_the_program_that_its_output_is_piped_to(tmp_path: Path) -> None:
    """Ctrl-C ends ``tee`` as well. The error that is reported into the closed pipe is not replaced by another one."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "train/main.py", "--no_such_flag"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=writer, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 2
