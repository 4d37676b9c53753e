"""Help on the command line: examples at the end of every ``--help``, and completion in the shell.

In: the commands. Out: text, and the names that complete a word. Nothing here imports what the commands run.
"""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from prep.annotations import DEFAULT_REGISTRY
from prep.exits import guarded, print_result, run_process
from schemas.errors import VlprepError

EXAMPLES = {
    "vlprep": (
        "vlprep validate mine/annotations.jsonl",
        "vlprep build mine/annotations.jsonl --out shards/mine",
        "vlprep show shards/mine --bin 0",
    ),
    "build": (
        "vlprep build mine/annotations.jsonl --out shards/mine",
        "vlprep build a.jsonl b.jsonl%50 --out shards/mix --max-length 8192 --workers 16",
        "vlprep build 'mp_doc%50,clevr_mc' --out s3://bucket/shards --report",
    ),
    "validate": (
        "vlprep validate mine/annotations.jsonl",
        "vlprep validate a.jsonl --deep --rejects bad.jsonl --fixed good.jsonl",
        "vlprep validate mp_doc --max-length 4096 --json",
    ),
    "datasets": ("vlprep datasets", "vlprep datasets --registry mine/datasets.toml --json"),
    "demo": ("vlprep demo demo-data", "vlprep demo demo-data --seed 1"),
    "migrate": (
        "vlprep migrate scripts/sft_7b.sh",
        "vlprep migrate data/__init__.py",
        "vlprep migrate -- swift sft --model Qwen/Qwen2.5-VL-3B-Instruct --dataset mine.jsonl",
    ),
    "verify": ("vlprep verify shards/mine", "vlprep verify s3://bucket/shards --workers 16 --json"),
    "show": (
        "vlprep show shards/mine --bin 0",
        "vlprep show shards/mine --bin 0 --token-level | less",
        "vlprep show runs/mine --step 12 --save pngs",
    ),
    "report": (
        "vlprep report shards/mine --out report.html",
        "vlprep report shards/mine --out report.html --bin 0 --sample mine:17",
        "vlprep report shards/mine --out report.html --datasets mine/annotations.jsonl",
    ),
    "completion": (
        "vlprep completion bash > ~/.local/share/bash-completion/completions/vlprep",
        "vlprep completion zsh > ~/.zfunc/_vlprep",
        "vlprep completion fish > ~/.config/fish/completions/vlprep.fish",
    ),
}
"""Command lines by the name of the command."""


def _write_examples(name: str, formatter: click.HelpFormatter) -> None:
    with formatter.section("Examples"):
        for line in EXAMPLES[name]:
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class _Command(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(str(self.name), formatter)


class Program(click.Group):
    """A group of commands whose help ends with examples."""

    command_class = _Command

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line. Without arguments it is that of this process, which ends with it."""
        if args or kwargs:
            return super().__call__(*args, **kwargs)
        return run_process(super().__call__)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(str(self.name), formatter)


def complete_dataset(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The registered datasets that begin like the word; files, if there are none."""
    from prep.annotations.registry import Registry

    try:
        names = list(Registry.read(context.params.get("registry") or DEFAULT_REGISTRY).tables)
    except (VlprepError, OSError):
        names = []
    # The scripts drop what precedes an item of type file.
    return [
        CompletionItem(incomplete, type="file"),
        *(CompletionItem(name) for name in names if name.startswith(incomplete)),
    ]


@click.command("completion", cls=_Command)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@guarded
def completion_command(shell: str) -> None:
    """Print the script for completion in SHELL.

    It completes commands, options, datasets and files.
    """
    completion_class = get_completion_class(shell)
    if completion_class is None:
        raise AssertionError(f"click completes in {shell}")
    program = click.get_current_context().find_root().command
    print_result(completion_class(program, {}, "vlprep", "_VLPREP_COMPLETE").source())
