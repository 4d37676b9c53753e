"""Metrics of logged steps -> ``metrics.jsonl``, the screen, TensorBoard or wandb.

Only the first rank writes. ``metrics.jsonl`` has one JSON object per logged step. A run that resumes first drops the
lines of later steps, which are trained again, so that the file has every step once. TensorBoard purges these steps too.
In wandb a resumed run is a new one.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from schemas.errors import ConfigError
from storage.files import write_synced
from train.batches.stream import StepBatch
from train.model.flops import ModelFlops
from train.order.dealing import DataOrder
from train.run.stragglers import OwnTime, StepClock, find_slowest
from train.settings.arguments import TrainArguments

METRICS_FILE = "metrics.jsonl"

_GROUPS = {
    "data": ("num_tokens", "num_targets", "padding", "data_wait_s"),
    "perf": ("tokens_per_s", "samples_per_s", "step_s", "efficiency", "tflops", "mfu", "max_memory_bytes", "slowest"),
}
"""Groups of the metrics in TensorBoard and wandb. Those of an evaluation are in ``eval/``, others in ``train/``."""

Record = dict[str, Any]
"""Metrics of one logged step. Nested dicts hold one value per part of the model, or per dataset."""


class Window:
    """Accumulates the steps between two logged steps and turns them into a record."""

    def __init__(
        self,
        order: DataOrder,
        device: torch.device,
        flops: ModelFlops,
        *,
        deal: Callable[[int], NDArray[np.int64]],
        peak_tflops: float | None,
    ) -> None:
        """Start the first window.

        Args:
            order: the order of the bins.
            device: of this rank.
            flops: operations of the model.
            deal: the bins of a step on all ranks, see :meth:`DataOrder.bins_of_step`.
            peak_tflops: peak of the device of a rank, in 10^12 operations per second; None if unknown.
        """
        self.clock = StepClock(device)
        self._order = order
        self._deal = deal
        self._device = device
        self._flops = flops
        self._peak_tflops = peak_tflops
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._paused_s = 0.0
        self._num_steps = self._num_tokens = self._num_samples = 0
        self._max_tokens = 0
        self._data_wait_s = self._efficiency = self._num_flops = 0.0

    def add(self, batch: StepBatch) -> None:
        """Add a step that is done. :attr:`clock` has measured its forward passes."""
        self.clock.end_step(batch.step, batch.data_wait_s)
        self._num_steps += 1
        self._num_tokens += batch.num_tokens
        self._max_tokens += batch.max_tokens
        self._num_samples += batch.num_samples
        self._data_wait_s += batch.data_wait_s
        self._efficiency += batch.efficiency
        self._num_flops += sum(self._flops.count(micro) for micro in batch.micro_batches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the ``with`` block."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def summarise(
        self,
        batch: StepBatch,
        losses: torch.Tensor,
        rates: dict[str, float],
        grad_norm: torch.Tensor | float,
        num_skipped: int,
    ) -> Record:
        """Make the record of the last step and start a new window. Collective.

        Loss, learning rates, gradient norm and counts are those of the step. Times and speeds are means over the
        window, of the slowest rank. Padding and efficiency are means over the window. Operations are those of a rank,
        averaged over the ranks. A loss or norm that is not finite is None. With several ranks, ``slowest`` holds the
        attributes of :class:`train.run.stragglers.Slowest`.

        Args:
            batch: the step.
            losses: (A,) float32, cross-entropy summed over the targets of each micro-batch of this rank.
            rates: learning rate of every trained part in this step.
            grad_norm: norm of the gradient before clipping.
            num_skipped: steps skipped since the run started or resumed.
        """
        flops = torch.tensor(self._num_flops, dtype=torch.float64, device=losses.device)
        totals = torch.stack([losses.double().sum(), flops])
        torch.distributed.all_reduce(totals)
        step_s = (time.perf_counter() - self._began - self._paused_s) / self._num_steps
        wait_s = self._data_wait_s / self._num_steps
        own = torch.tensor(
            [step_s, wait_s, peak_memory_bytes(self._device), *self.clock.take()],
            dtype=torch.float64,
            device=self._device,
        )
        gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, own)
        of_ranks = torch.stack(gathered).tolist()  # (W, 5)
        step_s, wait_s, memory_bytes = (max(values) for values in list(zip(*of_ranks))[:3])
        slowest = find_slowest([OwnTime(mean_s, int(step)) for *_, mean_s, step in of_ranks], self._deal)
        loss_sum, num_flops = totals.tolist()
        tflops = num_flops / torch.distributed.get_world_size() / self._num_steps / step_s / 1e12
        record: Record = {
            "step": batch.step + 1,
            "epoch": self._epoch(batch.step + 1),
            "loss": _finite(loss_sum / max(1, batch.num_targets)),
            "learning_rate": next(iter(rates.values())),
            "learning_rates": rates,
            "grad_norm": _finite(float(grad_norm)),
            "tokens_per_s": self._num_tokens / self._num_steps / step_s,
            "samples_per_s": self._num_samples / self._num_steps / step_s,
            "num_tokens": batch.num_tokens,
            "num_targets": batch.num_targets,
            "padding": 1 - self._num_tokens / self._max_tokens,
            "efficiency": self._efficiency / self._num_steps,
            "step_s": step_s,
            "data_wait_s": wait_s,
            "tflops": tflops,
            **({} if self._peak_tflops is None else {"mfu": tflops / self._peak_tflops}),
            "skipped_steps": num_skipped,
            "max_memory_bytes": int(memory_bytes),
            **({} if slowest is None else {"slowest": asdict(slowest)}),
        }
        self._reset()
        return record

    def _epoch(self, steps_done: int) -> float:
        """Passes over all bins. The last step of the order may have fewer bins than the others, hence the minimum."""
        passes = steps_done / self._order.steps_per_epoch
        return round(passes if self._order.epochs is None else min(passes, self._order.epochs), 4)


class Sink(Protocol):
    """Destination of records."""

    def write(self, record: Record) -> None:
        """Write the record of a step."""

    def close(self) -> None:
        """Flush and close."""


class MetricsLog:
    """Shows progress and passes records to all sinks. Only the first rank has sinks."""

    def __init__(
        self, bar: tqdm[NoReturn], sinks: Sequence[Sink], *, num_steps: int, is_first: bool, is_verbose: bool
    ) -> None:
        """Open a log.

        Args:
            bar: shows progress on a terminal; disabled elsewhere.
            sinks: where records go besides the screen.
            num_steps: steps of the run.
            is_first: whether this rank shows records.
            is_verbose: whether it shows all their metrics.
        """
        self._bar = bar
        self._sinks = sinks
        self._num_steps = num_steps
        self._is_first = is_first
        self._is_verbose = is_verbose

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        self._bar.update()

    def write(self, record: Record) -> None:
        """Write the record of a step. It gets a line of its own on the screen, since the screen truncates a bar."""
        if self._is_first:
            line = format_record(record, num_steps=self._num_steps, is_verbose=self._is_verbose)
            self._bar.write(line, file=sys.stderr)
        for sink in self._sinks:
            sink.write(record)


@contextmanager
def open_log(args: TrainArguments, *, is_first: bool, start_step: int, num_steps: int) -> Iterator[MetricsLog]:
    """Open the log of a run for the ``with`` block.

    Args:
        args: the flags, with the folder of the run and ``--report_to``.
        is_first: whether this rank writes.
        start_step: steps done before. Metrics of later steps are dropped.
        num_steps: steps of the run.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if is_first:
            args.run_dir.mkdir(parents=True, exist_ok=True)
            for kind in (_JsonLines, *_REPORTERS[args.report_to]):
                sinks.append(stack.enter_context(closing(kind(args, start_step))))
        # A bar in a file would be a line for each step.
        is_shown = is_first and sys.stderr.isatty()
        bar = stack.enter_context(
            tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not is_shown)
        )
        if is_shown:  # print log lines above the bar, not into it
            stack.enter_context(logging_redirect_tqdm())
        yield MetricsLog(bar, sinks, num_steps=num_steps, is_first=is_first, is_verbose=args.verbose)


def format_record(record: Record, *, num_steps: int, is_verbose: bool) -> str:
    """The metrics of a record in one line, the main ones or all.

    One learning rate stands for all parts if they have the same.

    Args:
        record: the record.
        num_steps: steps of the run.
        is_verbose: whether to show all metrics.
    """
    step, norm = record["step"], record["grad_norm"]
    rates = {part: f"{rate:.2e}" for part, rate in record["learning_rates"].items()}
    one_rate = len({*rates.values()}) == 1
    shown = {
        "loss": format_loss(record["loss"]),
        **({"lr": next(iter(rates.values()))} if one_rate else {f"lr_{part}": rate for part, rate in rates.items()}),
        "tokens_per_s": f"{record['tokens_per_s']:.0f}",
        "data_wait": f"{record['data_wait_s'] / record['step_s']:.1%}",
        "left": tqdm.format_interval((num_steps - step) * record["step_s"]),
    }
    if is_verbose:
        shown |= {
            "norm": "not finite" if norm is None else f"{norm:.3g}",
            "samples_per_s": f"{record['samples_per_s']:.1f}",
            "targets": str(record["num_targets"]),
            "padding": f"{record['padding']:.1%}",
            "efficiency": f"{record['efficiency']:.3f}",
            **({"mfu": f"{record['mfu']:.1%}"} if "mfu" in record else {"tflops": f"{record['tflops']:.3g}"}),
            "skipped": str(record["skipped_steps"]),
            "memory": f"{record['max_memory_bytes'] / 2**30:.1f}GiB",
        }
    return f"step {step}/{num_steps}: " + ", ".join(f"{name}={value}" for name, value in shown.items())


def format_loss(loss: float | None) -> str:
    """A loss with four decimals."""
    return "not finite" if loss is None else f"{loss:.4f}"


def drop_later_steps(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``, and the unfinished last line of a killed run."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step]
    write_synced(path, "".join(kept).encode())


def flatten(record: Record) -> dict[str, float]:
    """Flatten a record: ``{"a": {"b": 1}}`` becomes ``{"a/b": 1}``. None and lists are dropped."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{key}": item for key, item in flatten(value).items()})
        elif value is not None and not isinstance(value, (list, tuple)):
            flat[name] = value
    return flat


def grouped(record: Record) -> dict[str, float]:
    """Flatten a record for TensorBoard and wandb, which show metrics in groups by the first part of their names.

    The groups are ``train/``, ``data/``, ``perf/``, and ``eval/``, whose metrics lose their prefix.
    """
    groups: dict[str, Record] = {}
    for name, value in record.items():
        group = next((group for group, names in _GROUPS.items() if name in names), "train")
        if name.startswith("eval_"):
            group, name = "eval", name.removeprefix("eval_")
        groups.setdefault(group, {})[name] = value
    return flatten(groups)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_reporter(report_to: str) -> None:
    """Check that the package of ``--report_to`` is installed.

    Raises:
        ConfigError: it is not.
    """
    if report_to != "none" and find_spec(report_to) is None:
        raise ConfigError(f"--report_to {report_to} needs the {report_to} package: pip install {report_to}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _JsonLines:
    """``metrics.jsonl``: one JSON object per line, flushed at once."""

    def __init__(self, args: TrainArguments, start_step: int) -> None:
        path = args.run_dir / METRICS_FILE
        drop_later_steps(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """Event files in the folder of the run, or in ``--logging_dir``."""

    def __init__(self, args: TrainArguments, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(args.logging_dir or args.run_dir), purge_step=start_step + 1)

    def write(self, record: Record) -> None:
        for name, value in grouped(record).items():
            self._writer.add_scalar(name, value, global_step=record["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, whose environment variables (project, entity, offline mode) apply."""

    def __init__(self, args: TrainArguments, start_step: int) -> None:
        import wandb

        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
        try:
            self._run = wandb.init(name=args.name, dir=str(args.run_dir), config=settings)
        except wandb.Error as error:
            raise ConfigError(
                f"--report_to wandb: {str(error).splitlines()[0]} Run `wandb login`, or set WANDB_MODE=offline."
            ) from error

    def write(self, record: Record) -> None:
        self._run.log(grouped(record), step=record["step"], commit=True)

    def close(self) -> None:
        self._run.finish()


_REPORTERS: dict[str, tuple[Callable[[TrainArguments, int], Sink], ...]] = {
    "none": (),
    "tensorboard": (_TensorBoard,),
    "wandb": (_WeightsAndBiases,),
}
