"""The command line of ``vlprep``: parse, configure, call, exit code. 0 fine, 1 problems in the data, 2 wrong use.

Each command imports what it runs when it runs, so that ``--help`` and wrong use are answered in a quarter of a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.annotations import DEFAULT_REGISTRY
from prep.engines import open_engine
from prep.exits import guarded, print_json, print_result
from prep.help import Program, complete_dataset, completion_command
from prep.options import (
    FILE,
    FOLDER,
    FOLDER_OR_URL,
    PATH_OR_URL,
    Share,
    build_settings,
    engine_options,
    json_option,
    look_model_option,
    media_root_option,
    media_settings,
    require_writable,
    setting_options,
)
from schemas.errors import ConfigError
from schemas.manifest import REPORT_FILE
from schemas.qwen import DEFAULT_MODEL
from schemas.settings import BuildSettings, MediaSettings
from schemas.wording import counted
from storage.urls import Location

if TYPE_CHECKING:
    from prep.inspect.transcript import Transcriber


def _interrupt(*_: object) -> None:
    """Let SIGTERM of a scheduler end a command like Ctrl-C."""
    raise KeyboardInterrupt


@click.group("vlprep", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.version_option(package_name="vlprep")
def main(debug: bool) -> None:
    """Turn chat annotations with images and videos into packed training shards for Qwen2.5-VL."""
    signal.signal(signal.SIGTERM, _interrupt)
    # numpy starts a thread for every core when it is imported, of which a build has no use. Without threads, workers
    # and decoders can be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s")
    for noisy in ("PIL", "urllib3", "httpx", "filelock", "botocore", "aiobotocore", "asyncio", "fsspec", "s3fs"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It logs tracebacks of requests that are retried or reported in one sentence.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


main.add_command(completion_command)


@main.command("build")
@click.argument("datasets", nargs=-1, required=True, shell_complete=complete_dataset)
@click.option("--out", type=FOLDER_OR_URL, required=True, help="Folder or URL of the shards.")
@click.option(
    "--work-dir",
    type=FOLDER,
    help="If --out is a URL: folder for unfinished work.  [default: in the user's cache folder]",
)
@click.option("--registry", type=FILE, help=f"Registry of datasets.  [default: {DEFAULT_REGISTRY}]")
@media_root_option
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="Checkpoint folder or hub id. Only its tokenizer is read."
)
@setting_options(BuildSettings)
@click.option(
    "--max-rejected",
    type=Share(),
    default="100%",
    show_default=True,
    help="Fail if a larger share of the annotations is rejected.",
)
@click.option("--overwrite", is_flag=True, help="Replace a finished set of other annotation files in --out.")
@click.option("--retry-media", is_flag=True, help="Retry media that an earlier run could not use.")
@click.option("-v", "--verbose", is_flag=True, help="Also print all datasets and the times of the build.")
@click.option("--report", is_flag=True, help=f"Also write a page about the shards, {REPORT_FILE} beside them.")
@json_option
@engine_options
@setting_options(MediaSettings)
@guarded
def build_command(
    datasets: tuple[str, ...],
    out: Location,
    work_dir: Path | None,
    registry: Path | None,
    media_root: Location | None,
    model: str,
    max_rejected: Fraction,
    overwrite: bool,
    retry_media: bool,
    verbose: bool,
    report: bool,
    as_json: bool,
    workers: int | None,
    engine: str,
    ray_address: str | None,
    **settings_options: Any,
) -> None:
    """Build a set of shards from DATASETS.

    DATASETS are a registry expression (mp_doc%50,clevr_mc), or paths or URLs of annotation files, each with an optional
    share (a.jsonl b.jsonl%50).
    """
    from prep.annotations.registry import find_all_sources
    from prep.build.metrics import read_metrics
    from prep.build.pipeline import BuildRequest, build
    from prep.build.summary import build_json, build_summary, metrics_summary

    require_writable(out, work_dir)
    settings = build_settings(settings_options)
    sources = find_all_sources(datasets, registry=registry, media_root=media_root, media=settings.media)
    request = BuildRequest(
        sources=tuple(sources),
        out=out,
        settings=settings,
        model=model,
        max_rejected=max_rejected,
        retry_media=retry_media,
        overwrite=overwrite,
        work_dir=work_dir,
    )
    with open_engine(engine, workers=workers, ray_address=ray_address) as workforce:
        manifest = build(request, workforce)
    metrics = read_metrics(out) if verbose else None
    if not as_json:
        print_result(build_summary(manifest, out, model=model, verbose=verbose, with_report=report))
        if metrics is not None:
            print_result(metrics_summary(metrics))
    if report:
        from prep.inspect.report import NamedInputs, ReportRequest, write_report

        named = NamedInputs(datasets=datasets, registry=registry, media_root=media_root, model=model)
        written = write_report(out, out / REPORT_FILE, ReportRequest(named=named, sources=request.sources))
        if not as_json:
            print_result(f"Report: {written}")
    if as_json:
        print_json(build_json(manifest, out, metrics=metrics, report=out / REPORT_FILE if report else None))


@main.command("validate")
@click.argument("files", nargs=-1, required=True, type=PATH_OR_URL, shell_complete=complete_dataset)
@click.option("--registry", type=FILE, help=f"Registry of datasets.  [default: {DEFAULT_REGISTRY}]")
@media_root_option
@click.option("--deep", is_flag=True, help="Decode all media, not only their headers.")
@click.option("--rejects", type=FILE, help="Write the rejected records here, one JSON object per line.")
@click.option("--fixed", type=FILE, help="Write the valid records here, one JSON object per line.")
@setting_options(BuildSettings, "reserved", "strict_fields")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Capacity of a bin in tokens: also find samples that are too long."
)
@click.option(
    "--model",
    help=f"With --max-length: checkpoint folder or hub id. Only its tokenizer is read.  [default: {DEFAULT_MODEL}]",
)
@json_option
@engine_options
@setting_options(MediaSettings)
@guarded
def validate_command(
    files: tuple[Location, ...],
    registry: Path | None,
    media_root: Location | None,
    deep: bool,
    rejects: Path | None,
    fixed: Path | None,
    reserved: str,
    strict_fields: bool | None,
    max_length: int | None,
    model: str | None,
    as_json: bool,
    workers: int | None,
    engine: str,
    ray_address: str | None,
    **media_options: Any,
) -> int:
    """Check annotation FILES and their media.

    FILES are paths, URLs, or names of registered datasets. Exit 1 on problems, 2 on boxes whose coordinates are not
    declared.
    """
    from prep.inspect.validate import ValidateRequest, validate
    from prep.samples.lengths import open_length_check

    if model is not None and max_length is None:
        raise ConfigError("--model has no effect without --max-length, which counts tokens. Give both, or neither.")
    request = ValidateRequest(
        files=files,
        media_root=media_root,
        registry=registry,
        deep=deep,
        rejects=rejects,
        fixed=fixed,
        reserved=reserved,
        strict_fields=bool(strict_fields),
        media=media_settings(media_options),
        lengths=None if max_length is None else open_length_check(model or DEFAULT_MODEL, max_length),
    )
    with open_engine(engine, workers=workers, ray_address=ray_address) as workforce:
        report = validate(request, workforce)
    print_result(report.json() if as_json else report.text())
    return report.exit_code


@main.command("datasets")
@click.option("--registry", type=FILE, default=DEFAULT_REGISTRY, show_default=True)
@json_option
@guarded
def datasets_command(registry: Path, as_json: bool) -> None:
    """List the registered datasets and whether their files exist."""
    from prep.annotations.registry import Registry

    rows = Registry.read(registry).listed()
    if as_json:
        print_json({"datasets": [row.content() for row in rows]})
        return
    for row in rows:
        files = ", ".join(map(str, row.files))
        print_result(f"{row.name:<20} {row.state}" + (f": {files}; media in {row.media_root}" if row.files else ""))


@main.command("demo")
@click.argument("out", type=FOLDER)
@click.option("--seed", type=int, default=0, show_default=True)
@guarded
def demo_command(out: Path, seed: int) -> None:
    """Write the demo dataset to OUT.

    It has scenes, document pages, videos and chats with checkable answers.
    """
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "demo" / "__init__.py").is_file():
        raise ConfigError("the demo needs a checkout of the repository: it is not part of the installed package")
    # Not even an editable install puts demo on the path.
    sys.path.insert(0, str(checkout))
    from demo import write_demo

    print_result(str(write_demo(out, seed=seed)))


@main.command("migrate")
@click.argument("script", nargs=-1, required=True)
@click.option("--out", help="Folder of the shards.  [default: shards/ and the names of the datasets]")
@click.option(
    "--registry",
    type=FILE,
    help="Registry of the datasets: data/__init__.py of the upstream framework, or dataset_info.json of "
    "LLaMA-Factory.  [default: where these have it, near SCRIPT]",
)
@guarded
def migrate_command(script: tuple[str, ...], out: str | None, registry: Path | None) -> int:
    """Print the two commands that do the same as SCRIPT.

    SCRIPT is a launch script of the upstream framework, of ms-swift or of LLaMA-Factory (also its YAML), a registry of
    datasets (.py, dataset_info.json), or a command line after --.

    Nothing in SCRIPT is run. Exit 1 if a part of it was not understood.
    """
    from prep.migrate.launch import read_script, read_words
    from prep.migrate.report import find_registry, make_report, registry_report
    from prep.migrate.rewrite import rewrite

    path = Path(script[0]) if len(script) == 1 and not script[0].startswith("--") else None
    if path is not None and (path.suffix == ".py" or path.name == "dataset_info.json"):
        report = registry_report(path)
    else:
        launch = read_words(script) if path is None else read_script(path)
        report = make_report(rewrite(launch, out=out), registry or find_registry(launch, path))
    print_result(report.text())
    return 0 if report.is_complete else 1


@main.command("verify")
@click.argument("folder", metavar="DIR", type=FOLDER_OR_URL)
@json_option
@engine_options
@guarded
def verify_command(folder: Location, as_json: bool, workers: int | None, engine: str, ray_address: str | None) -> int:
    """Check every byte, count and invariant of the shards in DIR. Exit 1 on damage."""
    from prep.inspect.verify import verify

    with open_engine(engine, workers=workers, ray_address=ray_address) as workforce:
        verification = verify(folder, workforce)
    if as_json:
        print_json(verification.content())
    else:
        print_result(verification.text())
    return 1 if verification.findings else 0


@main.command("show")
@click.argument("folder", metavar="DIR", type=FOLDER_OR_URL)
@click.option("--bin", "bin_id", type=click.IntRange(min=0), help="Id of the bin.")
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="DIR is the folder of a run: show the bins of this step, counted from 0. Step 12 of the log is 11.",
)
@click.option("--token-level", is_flag=True, help="List the tokens with ids, labels and positions instead of the text.")
@click.option("--save", type=FOLDER, help="Write the images of the bin into this folder, as PNG files.")
@look_model_option
@guarded
def show_command(
    folder: Location, bin_id: int | None, step: int | None, token_level: bool, save: Path | None, model: str | None
) -> None:
    """Print a bin of a set of shards, or the bins of a step.

    It shows text, media, and what is trained. DIR is the folder of the shards, or with --step that of the run.
    """
    from prep.inspect.show import save_frames, show
    from prep.inspect.step import open_bins
    from prep.inspect.terminal import open_console, print_bin, wants_colour
    from prep.inspect.transcript import warn_without_texts

    console = open_console()
    transcribers: list[Transcriber] = []
    for heading, shards, shown_bin, transcriber in open_bins(folder, bin_id=bin_id, step=step, model=model):
        transcribers.append(transcriber)
        if heading:
            print_result(heading)
        if console is not None:
            print_bin(console, shards, shown_bin, transcriber, token_level=token_level)
        else:
            text = show(shards, shown_bin, transcriber, colour=wants_colour(), token_level=token_level)
            print_result(text, is_styled=True)
        if save is not None:
            num_files = len(save_frames(shards, shown_bin, save, transcriber))
            print_result(f"\n{counted(num_files, 'PNG file')} written to {save}")
    warn_without_texts(*transcribers)


@main.command("report")
@click.argument("folder", metavar="DIR", type=FOLDER_OR_URL)
@click.option("--out", type=FILE, required=True, help="HTML file to write. Its folder is created.")
@click.option("--bin", "bins", type=click.IntRange(min=0), multiple=True, help="Show all samples of this bin.")
@click.option(
    "--sample",
    "samples",
    metavar="DATASET:RECORD",
    multiple=True,
    help="Show this sample.  [default, without --bin: a choice from every dataset]",
)
@look_model_option
@click.option(
    "--datasets",
    multiple=True,
    shell_complete=complete_dataset,
    help="The DATASETS of the build: adds the sizes of images before resizing, and images of rejected records.",
)
@click.option("--registry", type=FILE, help=f"With --datasets: registry of datasets.  [default: {DEFAULT_REGISTRY}]")
@click.option(
    "--media-root",
    type=FOLDER_OR_URL,
    help="With --datasets: folder or URL of the media of annotation files.  [default: the folder of each file]",
)
@guarded
def report_command(
    folder: Location,
    out: Path,
    bins: tuple[int, ...],
    samples: tuple[str, ...],
    model: str | None,
    datasets: tuple[str, ...],
    registry: Path | None,
    media_root: Location | None,
) -> None:
    """Write one HTML page about the shards in DIR.

    The page shows samples, mixture, lengths, balance and rejects.

    --bin and --sample may be repeated.
    """
    from prep.annotations.registry import find_all_sources
    from prep.inspect.report import NamedInputs, ReportRequest, write_report

    if not datasets and (registry is not None or media_root is not None):
        raise ConfigError("--registry and --media-root have no effect without --datasets. Give them together.")
    sources = find_all_sources(datasets, registry=registry, media_root=media_root, media=MediaSettings())
    named = NamedInputs(datasets=datasets, registry=registry, media_root=media_root, model=model)
    request = ReportRequest(named=named, sources=tuple(sources), bins=bins, samples=samples)
    print_result(write_report(folder, out, request))
