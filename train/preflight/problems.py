"""What is wrong on any rank: problems of each rank -> one error on all ranks, which the first rank explains.

Cost: one exchange of a few lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from schemas.errors import ConfigError, VlprepError
from train.run import process_group
from train.run.process_group import Ranks

MAX_PROBLEMS_SHOWN = 8


def stop_on_problems(problems: list[str], ranks: Ranks, error: type[VlprepError]) -> None:
    """End the dry run on all ranks if any rank has problems. All ranks call this together.

    Args:
        problems: problems of this rank.
        ranks: this rank.
        error: class of the error.

    Raises:
        VlprepError: of the given class, if there are problems.
    """
    problems = gather_problems(problems, ranks)
    if problems:
        process_group.leave()
        raise error(explain(problems, ranks))


def gather_problems(problems: list[str], ranks: Ranks) -> list[str]:
    """Problems of all ranks without duplicates, with the ranks unless all have it. All ranks call this together."""
    gathered: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(gathered, problems)
    ranks_by_problem: dict[str, list[int]] = {}
    for rank, problems_of_rank in enumerate(gathered):
        for problem in problems_of_rank:
            ranks_by_problem.setdefault(problem, []).append(rank)
    return [
        problem if len(affected) == ranks.world else f"{problem} (rank {', '.join(map(str, affected))})"
        for problem, affected in ranks_by_problem.items()
    ]


def explain(problems: list[str], ranks: Ranks) -> str:
    """The message of the first rank, which lists the problems, or of the other ranks."""
    if not ranks.is_first:
        return "dry run failed; see the message of rank 0."
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    shown = [*problems[:MAX_PROBLEMS_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
    return f"dry run failed: {'; '.join(shown)}."


@contextmanager
def room_for(subject: str) -> Iterator[None]:
    """Turn running out of device memory inside the ``with`` block into an error that says how to fix it.

    Raises:
        ConfigError: the device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(
            f"device memory is too small for {subject} ({reason}): lower --max_tokens_per_forward (or, where it is "
            "given, --per_device_train_batch_size), or use a higher ZeRO stage, more ranks or offloading."
        ) from error
