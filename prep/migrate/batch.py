"""The samples of a step in a launch: batch size, accumulation and launcher -> a number, or arithmetic for the shell.

What only a shell can know, such as the GPUs of a machine, stays arithmetic that the shell works out when it runs the
printed command: ``$((16*$NPROC))``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prep.migrate.launch import split_flags
from prep.migrate.rules import is_left_to_shell

GPUS = "$(nvidia-smi --list-gpus | wc -l)"
"""The GPUs of a machine."""


def factors_of_ranks(launcher: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The ranks that a launcher starts: machines and ranks of a machine, each a number or an expression of the shell.

    Args:
        launcher: words in front of the program.
        environment: variables that are set for it.

    Returns:
        None if neither the launcher nor the shell says.
    """
    name, *words = launcher
    if name == "python":
        return ("1",)
    options = {flag.name: flag.value for flag in split_flags(words, [])}
    if options.keys() & {"hostfile", "include", "exclude"} or "-H" in words:
        return None
    if name == "deepspeed":
        nodes, gpus = options.get("num_nodes", "1"), options.get("num_gpus", options.get("num_accelerators", ""))
    else:
        nodes, gpus = options.get("nnodes", "1"), options.get("nproc_per_node", "1")
    if gpus in ("", "gpu", "auto"):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        gpus = str(len(visible.split(","))) if visible and not is_left_to_shell(visible) else GPUS
    return nodes, gpus


def multiply(*factors: str) -> str | None:
    """The product of counts: a number, or arithmetic of the shell; None if a factor is neither."""
    if not all(factor.isdigit() or is_left_to_shell(factor) for factor in factors):
        return None
    product = math.prod(int(factor) for factor in factors if factor.isdigit())
    expressions = [factor for factor in factors if not factor.isdigit()]
    if not expressions:
        return str(product)
    if product == 1 and len(expressions) == 1:
        return expressions[0]
    return f"$(({'*'.join([*([] if product == 1 else [str(product)]), *expressions])}))"
