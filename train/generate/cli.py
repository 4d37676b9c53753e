"""``python -m train.generate``: wanted and generated answers side by side, and the share of exact matches.

A checkpoint and shards -> lines on the screen and, on request, a page with the images.

Cost: that of :mod:`train.generate.answers`.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from schemas.errors import ConfigError, ShardError
from schemas.wording import counted, printable
from train.exits import guarded, hide_library_output
from train.generate.answers import MAX_NEW_TOKENS, Answer, Answerer
from train.generate.page import render_page
from train.model import pretrained
from train.model.disk import writing
from train.run.run_dir import FINAL_DIR
from train.shards.index import open_shards

LIMIT = 20
_MIN_WIDTH = 24
"""Characters of a column on a narrow screen."""


@click.command(
    name="python -m train.generate",
    epilog="\b\nExamples:\n"
    "  python -m train.generate --model runs/mine/final --shards shards/mine\n"
    "  python -m train.generate --model runs/mine/final --shards shards/mine --limit 50 --html answers.html",
)
@click.option("--model", required=True, help="Checkpoint: the final/ of a run, another folder or a hub id.")
@click.option("--shards", required=True, help="Folders or URLs, as the trainer takes them.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="Answers, the first of the shards."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=MAX_NEW_TOKENS,
    show_default=True,
    help="Length at which an answer is cut off.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with the images, too.")
@guarded
def main(model: str, shards: str, limit: int, max_new_tokens: int, html: Path | None) -> None:
    """Let a model answer questions from shards: wanted and generated answers side by side, and the exact matches.

    Answers are greedy, on the GPU if there is one. Each trained answer of a sample is one, after all that precedes it.
    """
    hide_library_output()
    answers = []
    for answer in generate(model, shards, limit=limit, max_new_tokens=max_new_tokens, page=html):
        answers.append(answer)
        for line in describe(answer, len(answers), width=shutil.get_terminal_size().columns):
            click.echo(line)
    click.echo(summarise(answers))
    if html is not None:
        page = render_page(answers, title=f"{model} on {shards}", summary=summarise(answers))
        with writing(html):
            html.write_text(page, encoding="utf-8")
        click.echo(f"page: {html}")


def generate(
    model: str, shards: str, *, limit: int, max_new_tokens: int = MAX_NEW_TOKENS, page: Path | None = None
) -> Iterator[Answer]:
    """Answer the first questions of shards, after checking all that can be wrong with the inputs.

    Args:
        model: folder or hub id of a checkpoint.
        shards: as the trainer takes them.
        limit: number of answers.
        max_new_tokens: length at which an answer is cut off.
        page: file that is to be written afterwards.

    Raises:
        ConfigError: there is no complete model, its tokenizer is not that of the shards, or the page cannot be written.
        ShardError: the shards are incomplete, damaged, or without a trained answer.
    """
    if page is not None:
        _check_page(page)
    index = open_shards(shards)
    source = find_model(model)
    pretrained.check_fingerprints(source, index.manifests[0].fingerprints, shards=shards)
    answerer = Answerer(source, max_new_tokens=max_new_tokens)
    num_answers = 0
    for answer in itertools.islice(answerer.answer_shards(index), min(limit, sys.maxsize)):
        num_answers += 1
        yield answer
    if not num_answers:
        raise ShardError(f"{shards} has no trained answer to compare with. Give shards of conversations.")


def _check_page(page: Path) -> None:
    """Check that a page can be written, before the model answers for minutes.

    Raises:
        ConfigError: it cannot.
    """
    if not page.absolute().parent.is_dir():
        raise ConfigError(f"--html {page}: the folder {page.parent} does not exist. Create it, or give another file.")
    try:
        is_new = not page.exists()
        page.open("ab").close()
        if is_new:
            page.unlink()
    except OSError as error:
        raise ConfigError(f"--html {page} cannot be written: {error.strerror}. Give another file.") from error


def find_model(model: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        ConfigError: there is none, or it is not Qwen2.5-VL.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        finals = (folder / FINAL_DIR, folder.parent / FINAL_DIR)  # of a run, or beside its adapter and checkpoints
        final = next((final for final in finals if (final / "config.json").is_file()), None)
        remedy = f"Give the {FINAL_DIR}/ of a finished run." if final is None else f"Give {final}."
        raise ConfigError(f"--model {folder} holds no model (config.json is missing). {remedy}")
    source = pretrained.find_checkpoint(model, flag="--model")
    pretrained.read_shape(source)
    return source


def describe(answer: Answer, count: int, *, width: int) -> Iterator[str]:
    """An answer as lines: sample and question, then what is wanted and generated in two columns.

    Args:
        answer: the answer.
        count: which one it is, from 1.
        width: of the screen, in characters.
    """
    yield f"{count}. {answer.question.sample.name}: {verdict(answer)}"
    yield from textwrap.wrap(
        printable(answer.question.text), width, initial_indent="   ", subsequent_indent="   ", tabsize=4
    )
    column = max(_MIN_WIDTH, (width - 6) // 2)
    expected, generated = (_wrap(text, column) for text in (answer.question.expected, answer.generated))
    yield f"   {'wanted':<{column}} | generated".rstrip()
    for left, right in itertools.zip_longest(expected, generated, fillvalue=""):
        yield f"   {left:<{column}} | {right}".rstrip()
    yield ""


def verdict(answer: Answer) -> str:
    """Whether an answer is right, in words."""
    if answer.is_exact:
        return "exact"
    return "different" if answer.is_complete else "different, cut off"


def summarise(answers: list[Answer]) -> str:
    """The share of exact matches."""
    num_exact = sum(answer.is_exact for answer in answers)
    return f"exact match: {num_exact} of {counted(len(answers), 'answer')} ({num_exact / len(answers):.1%})"


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in printable(text).split("\n") for part in textwrap.wrap(line, width, tabsize=4) or [""]]
