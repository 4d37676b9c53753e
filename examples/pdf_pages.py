"""Turns a folder of PDFs and questions about their pages into page images and annotations.

``questions`` (one JSON object per line) -> conversations, one per set of pages -> ``annotations.jsonl``; pages -> PNG
files. It needs ``pip install pypdfium2``, the extra ``pdf``. ``docs/examples.md`` shows the commands around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Annotated

import click
import msgspec

from schemas.wording import counted

POINTS_PER_INCH = 72


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question about pages of a PDF, and its answer.

    Attributes:
        pdf: path relative to the folder of PDFs, and inside it.
        pages: numbers of the pages, from 1, in the order in which the model sees them.
    """

    pdf: str
    pages: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    question: str
    answer: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.pdf)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.pdf!r} leads out of the folder of PDFs")


class Turn(msgspec.Struct, frozen=True, rename={"speaker": "from"}):
    """One turn of a conversation, as LLaVA writes it."""

    speaker: str
    value: str


class Record(msgspec.Struct, frozen=True):
    """One annotation. Images are relative to its file."""

    id: str
    images: list[str]
    conversations: list[Turn]


def read_questions(path: Path) -> list[Question]:
    """Questions in the order of the PDFs and pages, so that each PDF is opened once.

    Raises:
        click.ClickException: a line is not a question.
    """
    questions = []
    for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(msgspec.json.decode(line, type=Question))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise click.ClickException(
                f"{path}, line {line_number}: {error}. A line has pdf, pages, question and answer."
            ) from error
    return sorted(questions, key=lambda question: (question.pdf, question.pages))


def write_pages(pdf: Path, folder: Path, numbers: list[int], dpi: int) -> None:
    """Write pages of a PDF as ``0001.png`` and so on.

    Raises:
        click.ClickException: the PDF cannot be read, has no such page, or pypdfium2 is missing.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise click.ClickException(f"reading PDFs needs a package: pip install pypdfium2 ({error}).") from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with pypdfium2.PdfDocument(pdf) as document:
            for number in numbers:
                if not 1 <= number <= len(document):
                    raise click.ClickException(
                        f"{pdf} has pages 1 to {len(document)}, and a question names page {number}. Correct its pages."
                    )
                page = document[number - 1]
                page.render(scale=dpi / POINTS_PER_INCH).to_pil().save(folder / _image_name(number))
                page.close()
    except (FileNotFoundError, pypdfium2.PdfiumError) as error:
        raise click.ClickException(f"{pdf}: {error} Replace the file, or remove its questions.") from error


def conversations(questions: list[Question]) -> Iterator[Record]:
    """One record per PDF and set of pages: the images once, then every question about them and its answer."""
    for (pdf, pages), about in groupby(questions, key=lambda question: (question.pdf, question.pages)):
        turns = [
            turn for question in about for turn in (Turn("human", question.question), Turn("gpt", question.answer))
        ]
        turns[0] = Turn("human", "<image>\n" * len(pages) + turns[0].value)
        yield Record(
            id=f"{pdf}:{','.join(map(str, pages))}",
            images=[f"pages/{pdf}/{_image_name(number)}" for number in pages],
            conversations=turns,
        )


def _image_name(number: int) -> str:
    return f"{number:04d}.png"


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("questions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--dpi", default=100, show_default=True, type=click.IntRange(1, 1200), help="Resolution of the images.")
def main(folder: Path, questions: Path, out: Path, dpi: int) -> None:
    """Turn the PDFs in FOLDER and the QUESTIONS about them into page images and annotations."""
    asked = read_questions(questions)
    out.mkdir(parents=True, exist_ok=True)
    for pdf, about in groupby(asked, key=lambda question: question.pdf):
        numbers = sorted({number for question in about for number in question.pages})
        write_pages(folder / pdf, out / "pages" / pdf, numbers, dpi)
    records = list(conversations(asked))
    lines = [msgspec.json.encode(record) + b"\n" for record in records]
    (out / "annotations.jsonl").write_bytes(b"".join(lines))
    summary = f"{counted(len(records), 'conversation')} with {counted(len(asked), 'question')}"
    click.echo(f"{out / 'annotations.jsonl'}: {summary}", err=True)


if __name__ == "__main__":
    main()
