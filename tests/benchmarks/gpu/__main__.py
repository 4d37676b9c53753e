"""A training step on a GPU, here and in the upstream trainer: ``python -m tests.benchmarks.gpu``.

One call of at most 9 minutes makes 2,000 samples (texts of 60 to 2,000 tokens, JPEG images of 150 to 1,500), builds
shards of them, and trains random models of the 3B (whole steps with AdamW) and the 7B (forward and backward): bins of
4k and 16k tokens, with the vision tower frozen and trained. Five contenders take turns on the same weights and on the
same bins of samples:

- ours with ``varlen``, and ours with ``sdpa``, from shards;
- upstream's padded batches, processed online by 4 workers and by as many as there are cores, with full logits;
- upstream's flattened batches, processed online, with full logits.

The upstream ways run on the attention kernel of ``varlen``, in place of flash-attn. They take the samples of one bin
per step, so that every contender computes the same in the same step.

Figures: tokens per second without padding, samples per second, model FLOPs by the one formula of
:class:`train.model.flops.ModelFlops`, times of steps, share of the time in which the device is busy and its longest gap
(profiler), how often a step waits for the device, waiting for data, peak memory against :mod:`train.memory`, losses of
the same bins; and single kernels. Tables appear as they become complete. A contender that runs out of memory is left
out of the rest of its case. ``--smoke`` runs all of it on a tiny model in seconds, on a CPU too.

What the machine must have: one GPU with 80 GB or more; Python 3.12; 100 GB of memory; ``/dev/shm``
of 15 GB, or 0.9 GB per core, through which worker processes pass pixels; torch 2.11 or newer with CUDA, whose
``varlen_attn`` knows ``window_size``, ``scale`` and ``enable_gqa``; numpy, pillow, pyarrow, xxhash, fsspec; and what
transformers 5.23 asks for: tokenizers 0.23.1, huggingface_hub 1.31, safetensors 0.8, regex, pyyaml, packaging, tqdm,
typer. It needs no flash-attn, no DeepSpeed (one GPU partitions nothing), no accelerate, no peft and no network. Wheels
to carry where they are missing, 48 MB in all: ``transformers==5.23.0``, ``msgspec``, ``zstandard``, ``click``,
``tenacity``, ``binpacking``, ``decord2`` (shards record its version; 27 MB), and ``dashscope`` (for the file of the
tokenizer; it is never imported). Install them with ``--no-deps``. The project itself need not be installed: start in
its root.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import torch

from demo.qwen_tokenizer import write_json, write_tokenizer_files
from demo.tiny_model import preprocessor_config
from tests.benchmarks.gpu.attention import kernel_for
from tests.benchmarks.gpu.contenders import Contender, make_contenders
from tests.benchmarks.gpu.corpus import Corpus, build_shards, open_bins, write_corpus
from tests.benchmarks.gpu.kernels import measure_kernels
from tests.benchmarks.gpu.measure import Runner
from tests.benchmarks.gpu.models import DTYPE, Arrangement
from tests.benchmarks.gpu.scale import REAL, SMOKE, Case, Scale
from tests.benchmarks.gpu.tables import Result, case_table, loss_lines, memory_line, verdict_lines
from tests.benchmarks.machine import describe_machine
from train.main import use_expandable_segments
from train.model.flops import peak_tflops

TIMED_SHARE = 0.5
"""Share of the time that turns are to take; warm-up, profiles and whatever else take the rest."""


class Schedule:
    """Divides the time that is left among the turns that are left."""

    def __init__(self, scale: Scale, num_contenders: int) -> None:
        self._end_s = time.perf_counter() + scale.max_s
        self._min_turn_s, self._max_turn_s = scale.min_turn_s, scale.max_turn_s
        self._num_turns = len(scale.cases) * num_contenders * scale.num_rounds

    @property
    def is_over(self) -> bool:
        """Whether nothing more may start."""
        return time.perf_counter() > self._end_s

    def take(self) -> float:
        """Seconds of the next turn."""
        left_s = max(0.0, self._end_s - time.perf_counter())
        share_s = TIMED_SHARE * left_s / max(1, self._num_turns)
        self._num_turns -= 1
        return min(max(self._min_turn_s, share_s), self._max_turn_s)


class Benchmark:
    """The run: data, then every case.

    Args:
        scale: how much of everything.
        folder: an empty folder for data.
        checkpoint: folder with tokenizer and processor files; written if it does not exist.
        device: where models run.
    """

    def __init__(self, scale: Scale, folder: Path, checkpoint: Path | None, device: torch.device) -> None:
        self._scale, self._folder, self._device = scale, folder, device
        self._checkpoint = folder / "checkpoint" if checkpoint is None else checkpoint
        self._schedule = Schedule(scale, num_contenders=5)

    def run(self) -> Iterator[str]:
        """Yield the report, part by part."""
        corpus = yield from self._prepare()
        for name, figure in measure_kernels(self._scale.num_patches, self._device):
            yield f"kernel: {name:<34} {figure}"
        with contextlib.ExitStack() as stack, kernel_for(self._device):
            by_length = {length: self._contenders(corpus, length, stack) for length in self._scale.lengths}
            for model, config in self._scale.configs.items():
                arrangement = Arrangement(config(), self._device)
                cases = [case for case in self._scale.cases if case.model == model]
                for case in cases:
                    if self._schedule.is_over:
                        yield f"\n{case.title}: left out, the time is over"
                        continue
                    compares = case is cases[0]
                    yield from self._run_case(case, arrangement, by_length[case.max_length], compares=compares)
                del arrangement
                self._free()

    def _prepare(self) -> Iterator[str]:
        start_s = time.perf_counter()
        corpus = write_corpus(self._folder / "corpus", self._scale)
        yield f"corpus: {len(corpus.lines):,} samples, {time.perf_counter() - start_s:.1f} s"
        if not (self._checkpoint / "preprocessor_config.json").exists():
            self._checkpoint.mkdir(parents=True, exist_ok=True)
            write_tokenizer_files(self._checkpoint, None)
            write_json(self._checkpoint / "preprocessor_config.json", preprocessor_config())
        for length in self._scale.lengths:
            taken_s = build_shards(corpus, self._checkpoint, self._shards(length), length)
            index, _ = open_bins(self._shards(length))
            yield (
                f"shards of {length} tokens: {index.num_bins:,} bins, {int(index.num_tokens.sum()):,} tokens, "
                f"{taken_s:.1f} s with vlprep build"
            )
        return corpus

    def _shards(self, length: int) -> Path:
        return self._folder / f"shards-{length}"

    def _contenders(self, corpus: Corpus, length: int, stack: contextlib.ExitStack) -> list[Contender]:
        index, records = open_bins(self._shards(length))
        contenders = make_contenders(
            corpus, self._checkpoint, index, records, num_workers=self._scale.num_workers, device=self._device
        )
        for contender in contenders:
            stack.callback(contender.feed.close)
        return contenders

    def _run_case(
        self, case: Case, arrangement: Arrangement, contenders: list[Contender], *, compares: bool
    ) -> Iterator[str]:
        arrangement.prepare(trains_vision=case.trains_vision, optimized=case.model in self._scale.optimized)
        runner = Runner(arrangement, self._device)
        results = {contender.name: Result(is_ours=contender.is_ours) for contender in contenders}
        if compares:
            for contender, result in zip(contenders, results.values()):
                with self._survive(result, arrangement):
                    result.losses = runner.losses(contender, range(self._scale.num_compared))
        for _ in range(self._scale.num_rounds):
            for contender, result in zip(contenders, results.values()):
                if result.failure is None and not self._schedule.is_over:
                    seconds = self._schedule.take()
                    with self._survive(result, arrangement):
                        result.turns.append(runner.turn(contender, seconds))
        for contender, result in zip(contenders, results.values()):
            if result.failure is None and not self._schedule.is_over:
                with self._survive(result, arrangement):
                    result.activity = runner.activity(contender, self._scale.num_profiled)
        yield from self._report(case, arrangement, results)

    def _report(self, case: Case, arrangement: Arrangement, results: Mapping[str, Result]) -> Iterator[str]:
        flops = arrangement.flops()
        step = "with AdamW" if arrangement.optimizer is not None else "forward and backward"
        yield f"\n{case.title}, {step}"
        yield case_table(results, flops, peak_tflops(self._device, DTYPE))
        yield from loss_lines(results)
        ours = next(result for result in results.values() if result.is_ours)
        if ours.turns:
            contents = [content for turn in ours.turns for content in turn.contents]
            yield memory_line(results, max(arrangement.memory(content) for content in contents))
        yield from verdict_lines(results, flops)

    @contextlib.contextmanager
    def _survive(self, result: Result, arrangement: Arrangement) -> Iterator[None]:
        """On a GPU, let a contender fail alone: without memory, or with a kernel that this torch does not have."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            if self._device.type != "cuda":
                raise
            is_memory = isinstance(error, torch.OutOfMemoryError)
            result.failure = "out of memory" if is_memory else f"{type(error).__name__}: {error}"[:300]
        if result.failure is not None:
            arrangement.hf.zero_grad(set_to_none=True)
            self._free()

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@click.command(name="python -m tests.benchmarks.gpu")
@click.option("--smoke", is_flag=True, help="Run everything on a tiny model, in seconds.")
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with tokenizer files.  [default: made]",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Empty folder where data are written.  [default: a temporary folder]",
)
def main(smoke: bool, checkpoint: Path | None, folder: Path | None) -> None:
    """Compare training steps on a GPU with those of the upstream trainer."""
    use_expandable_segments()
    has_gpu = torch.cuda.is_available()
    if not (smoke or has_gpu):
        raise click.ClickException("there is no GPU here: --smoke runs a tiny model on the CPU")
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"--folder {folder} is not empty: give another one")
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    click.echo(describe_machine("torch", "transformers", "numpy", "pillow"))
    click.echo(f"device: {torch.cuda.get_device_name(device) if has_gpu else 'CPU: its figures mean nothing'}")
    with contextlib.ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlprep-gpu-")))
        for line in Benchmark(SMOKE if smoke else REAL, work, checkpoint, device).run():
            click.echo(line)


if __name__ == "__main__":
    main()
