"""The work of the benchmark, in a process of its own: options -> messages to the supervisor.

The parts are the data, single kernels, and every case. A process that starts after another one has failed finds the
data on disk, and does the parts that are left.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path

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
from tests.benchmarks.gpu.supervisor import Kind
from tests.benchmarks.gpu.tables import Result, case_table, loss_lines, memory_line, verdict_lines
from tests.benchmarks.machine import describe_machine
from train.main import use_expandable_segments
from train.model.flops import ModelFlops, peak_tflops

DATA, KERNELS = "data", "single kernels"
"""Names of the parts that are no cases."""

NUM_CONTENDERS = 5

TIMED_SHARE = 0.5
"""Share of the time that turns are to take; warm-up, profiles and whatever else take the rest."""


def run_parts(
    sender: Connection, over: frozenset[str], *, smoke: bool, folder: Path, checkpoint: Path | None, until_s: float
) -> None:
    """Do the parts that are not over.

    Args:
        sender: gets what is done, see :data:`tests.benchmarks.gpu.supervisor.Kind`.
        over: parts to leave out.
        smoke: whether to run a tiny model.
        folder: for data; empty, or that of an earlier call.
        checkpoint: folder with tokenizer and processor files.
        until_s: when this process will be killed, in seconds of :func:`time.monotonic`.
    """
    use_expandable_segments()
    scale = SMOKE if smoke else REAL
    Benchmark(scale, folder, checkpoint, until_s - scale.reserve_s, sender).run(over)


class Schedule:
    """Divides the time that is left among the turns that are left."""

    def __init__(self, scale: Scale, num_places: int, last_start_s: float) -> None:
        self._end_s = last_start_s
        self._min_turn_s, self._max_turn_s = scale.min_turn_s, scale.max_turn_s
        self._num_turns = num_places * scale.num_rounds

    @property
    def is_over(self) -> bool:
        """Whether nothing more may start."""
        return time.monotonic() > self._end_s

    def take(self) -> float:
        """Seconds of the next turn."""
        left_s = max(0.0, self._end_s - time.monotonic())
        share_s = TIMED_SHARE * left_s / max(1, self._num_turns)
        self._num_turns -= 1
        return min(max(self._min_turn_s, share_s), self._max_turn_s)


class Benchmark:
    """The parts of the benchmark, one after the other.

    Args:
        scale: how much of everything.
        folder: for data.
        checkpoint: folder with tokenizer and processor files; written if it does not exist.
        last_start_s: when the last turn may start, in seconds of :func:`time.monotonic`.
        sender: gets what is done, see :data:`tests.benchmarks.gpu.supervisor.Kind`.
    """

    def __init__(
        self, scale: Scale, folder: Path, checkpoint: Path | None, last_start_s: float, sender: Connection
    ) -> None:
        self._scale, self._folder, self._last_start_s, self._sender = scale, folder, last_start_s, sender
        self._checkpoint = folder / "checkpoint" if checkpoint is None else checkpoint
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def run(self, over: frozenset[str]) -> None:
        """Do the parts that are not over, as long as there is time."""
        cases = [case for case in self._scale.cases if case.title not in over]
        self._schedule = Schedule(self._scale, len(cases) * NUM_CONTENDERS, self._last_start_s)
        self._send("parts", "\n".join([DATA, KERNELS, *(case.title for case in self._scale.cases)]))
        if not over:
            name = "CPU: its figures mean nothing"
            if self._device.type == "cuda":
                name = torch.cuda.get_device_name(self._device)
            self._send("line", f"{describe_machine('torch', 'transformers', 'numpy', 'pillow')}\ndevice: {name}")
        corpus = self._prepare()
        if KERNELS not in over:
            self._send("begin", KERNELS)
            for name, figure in measure_kernels(self._scale.num_patches, self._device):
                self._send("line", f"kernel: {name:<34} {figure}")
            self._send("done", KERNELS)
        with contextlib.ExitStack() as stack, kernel_for(self._device):
            lengths = sorted({case.max_length for case in cases})
            by_length = {length: self._contenders(corpus, length, stack) for length in lengths}
            for model, of_model in groupby(cases, key=lambda case: case.model):
                arrangement: Arrangement | None = None
                for case in of_model:
                    if self._schedule.is_over:
                        break
                    self._send("begin", case.title)
                    compares = arrangement is None
                    if arrangement is None:
                        arrangement = Arrangement(self._scale.configs[model](), self._device)
                    self._run_case(case, arrangement, by_length[case.max_length], compares=compares)
                    self._send("done", case.title)
                del arrangement
                self._free()
        self._send("end")

    def _send(self, kind: Kind, text: str = "") -> None:
        self._sender.send((kind, text))

    def _prepare(self) -> Corpus:
        """Make samples and shards, or find those of an earlier process."""
        made = self._folder / "corpus.pickle"
        if made.exists():
            corpus: Corpus = pickle.loads(made.read_bytes())
            return corpus
        self._send("begin", DATA)
        start_s = time.perf_counter()
        corpus = write_corpus(self._folder / "corpus", self._scale)
        self._send("line", f"corpus: {len(corpus.lines):,} samples, {time.perf_counter() - start_s:.1f} s")
        if not (self._checkpoint / "preprocessor_config.json").exists():
            self._checkpoint.mkdir(parents=True, exist_ok=True)
            write_tokenizer_files(self._checkpoint, None)
            write_json(self._checkpoint / "preprocessor_config.json", preprocessor_config())
        for length in self._scale.lengths:
            taken_s = build_shards(corpus, self._checkpoint, self._shards(length), length)
            index, _ = open_bins(self._shards(length))
            self._send(
                "line",
                f"shards of {length} tokens: {index.num_bins:,} bins, {int(index.num_tokens.sum()):,} tokens, "
                f"{taken_s:.1f} s with vlprep build",
            )
        made.write_bytes(pickle.dumps(corpus))
        self._send("done", DATA)
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

    def _run_case(self, case: Case, arrangement: Arrangement, contenders: list[Contender], *, compares: bool) -> None:
        arrangement.prepare(trains_vision=case.trains_vision, optimized=case.model in self._scale.optimized)
        runner, flops = Runner(arrangement, self._device), arrangement.flops()
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
                    self._report(case, arrangement, results, flops)
        for contender, result in zip(contenders, results.values()):
            if result.failure is None and not self._schedule.is_over:
                with self._survive(result, arrangement):
                    result.activity = runner.activity(contender, self._scale.num_profiled)
        self._report(case, arrangement, results, flops)

    def _report(self, case: Case, arrangement: Arrangement, results: Mapping[str, Result], flops: ModelFlops) -> None:
        """Send all figures of a case so far."""
        step = "with AdamW" if arrangement.optimizer is not None else "forward and backward"
        lines = [f"\n{case.title}, {step}", case_table(results, flops, peak_tflops(self._device, DTYPE))]
        lines += loss_lines(results)
        ours = next(result for result in results.values() if result.is_ours)
        if ours.turns:
            contents = [content for turn in ours.turns for content in turn.contents]
            lines.append(memory_line(results, max(arrangement.memory(content) for content in contents)))
        lines += verdict_lines(results, flops)
        self._send("partial", "\n".join(lines))

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
