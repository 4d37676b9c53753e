"""Whether a run fits: its demand on device, host and disk, and what these have -> problems, in words.

Cost: none.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.wording import counted
from train.memory.states import MOMENTS
from train.memory.terms import DEVICE, GIB, HOST, Memory, Phase
from train.model.disk import nearest_existing
from train.model.sizes import Sizes
from train.run.plan import Plan
from train.run.run_dir import UNIVERSAL_TAG, list_checkpoints

logger = logging.getLogger(__name__)

STATE_BYTES = 12
"""Bytes of a trained parameter in a checkpoint at any ZeRO stage: float32 weight and both moments of AdamW."""

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Control groups of Linux (version 2), and the file that names the one of this process."""


def device_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device available to this process: free memory, and what torch has already reserved.

    The CUDA context, NCCL's buffers and other processes are excluded.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def host_bytes() -> int:
    """Memory of this machine, or the limit of the container or job that this process runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):  # no control groups
        entries = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
        for own in (CGROUPS / path.lstrip("/") for hierarchy, _, path in entries if hierarchy == "0"):
            for group in (own, *own.parents):
                with suppress(OSError, ValueError):  # the file is missing, or says "max"
                    limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def check_held(memory: Memory, available: int) -> list[str]:
    """Check, before anything is loaded, that weights, gradients and optimizer states fit the device.

    Args:
        memory: memory of a rank.
        available: bytes available on its device.
    """
    if memory.held() <= available:
        return []
    return [
        f"weights, gradients and optimizer states need {memory.held() / GIB:.1f} GiB, but the device has "
        f"{available / GIB:.1f} GiB: use a higher ZeRO stage, more ranks, offloading or LoRA"
    ]


def check_device(memory: Memory, peak: int, available: int) -> list[str]:
    """Check that a step fits the device, from the measured peak of its backward pass and the estimate of the rest.

    Args:
        memory: the estimate.
        peak: measured peak of a forward and a backward pass in bytes. It lacks the moments of the optimizer, which are
            allocated by its first step.
        available: bytes available on the device.
    """
    terms = [term for term in memory.terms if term.location == DEVICE]
    moments = sum(term.num_bytes for term in terms if term.name == MOMENTS)
    step = memory.held() + sum(term.num_bytes for term in terms if term.phase == Phase.STEP)
    needed = max(peak + moments, step)
    logger.info(
        "device memory, GiB: %.1f available, %.1f needed (measured %.1f, AdamW moments %.1f; estimate %.1f)",
        *(size / GIB for size in (available, needed, peak, moments, memory.peak())),
    )
    if needed <= available:
        return []
    return [
        f"a step needs {needed / GIB:.1f} GiB, but the device has {available / GIB:.1f} GiB: lower "
        "--max_tokens_per_forward (or, where it is given, --per_device_train_batch_size), or use a higher ZeRO stage, "
        "more ranks or offloading"
    ]


def export_bytes(plan: Plan, sizes: Sizes) -> int:
    """Host memory that the first rank needs to export the model, besides what offloading holds.

    It gathers all weights there, those of adapters too, which are then merged in place.
    """
    return plan.compute.dtype.itemsize * sizes.num_parameters


def snapshot_bytes(plan: Plan, sizes: Sizes, ranks: Sequence[int]) -> int:
    """Host memory of a checkpoint that some ranks write in the background; 0 if they do not.

    Each rank holds its files. While it serializes them, a copy of its float32 weights or of a moment comes on top.
    """
    if not plan.args.save_in_background:
        return 0
    part = -(-sizes.num_trained // plan.ranks.world)
    weights = plan.compute.dtype.itemsize * sizes.num_trained if 0 in ranks and _holds_weights(plan) else 0
    return len(ranks) * (STATE_BYTES + 4) * part + weights


def check_host(memory: Memory, num_ranks: int, available: int, *, snapshots: int, export: int) -> list[str]:
    """Check that a machine has the host memory for what its ranks offload, for checkpoints, and for the export.

    Args:
        memory: memory of a rank.
        num_ranks: ranks on this machine.
        available: bytes of host memory.
        snapshots: bytes of a checkpoint that its ranks write in the background.
        export: bytes that the export needs on this machine; 0 if the first rank is on another one.
    """
    per_rank, held = memory.peak(HOST), num_ranks * memory.held(HOST)
    if num_ranks * per_rank > available:
        return [
            f"offloading needs {num_ranks * per_rank / GIB:.1f} GiB ({counted(num_ranks, 'rank')} with "
            f"{per_rank / GIB:.1f} GiB each), but the machine has {available / GIB:.1f} GiB: "
            "use more machines, or offload less"
        ]
    problems, machine = [], f"but the machine has {available / GIB:.1f} GiB"
    if snapshots and num_ranks * per_rank + snapshots > available:
        offloaded = _next_to(num_ranks * per_rank)
        problems.append(
            f"--save_in_background holds {snapshots / GIB:.1f} GiB in host memory{offloaded}, {machine}: leave it out"
        )
    if held + export > available:
        problems.append(
            f"exporting the model gathers {export / GIB:.1f} GiB in the host memory of the first rank{_next_to(held)}, "
            f"{machine}: start the first rank on a machine with more memory" + (", or offload less" if held else "")
        )
    return problems


def _next_to(offloaded: int) -> str:
    return f" next to {offloaded / GIB:.1f} GiB that are offloaded" if offloaded else ""


def _holds_weights(plan: Plan) -> bool:
    """Whether a checkpoint holds the weights in the dtype of the computation. ZeRO-3 saves those in float32 only."""
    stage: int = plan.deepspeed["zero_optimization"]["stage"]
    return stage < 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUsage:
    """Peak disk usage of a run.

    Attributes:
        num_checkpoints: checkpoints that exist at a time.
        checkpoint: bytes of each checkpoint.
        model: bytes of the trained model, and of its adapters.
        converted: bytes of the universal form of a checkpoint of another number of ranks; 0 if none is written.
    """

    num_checkpoints: int
    checkpoint: int
    model: int
    converted: int = 0

    @property
    def num_bytes(self) -> int:
        """Total bytes."""
        return self.num_checkpoints * self.checkpoint + self.model + self.converted


def disk_usage(plan: Plan, sizes: Sizes) -> DiskUsage:
    """Peak disk usage of a run.

    Args:
        plan: the run.
        sizes: parameter counts of its model.
    """
    args, width = plan.args, plan.compute.dtype.itemsize
    interval = args.save_interval(plan.num_steps)
    # The last step has one in any case.
    last = plan.num_steps - 1
    num_checkpoints = last // interval - plan.start_step // interval + 1 if plan.start_step < plan.num_steps else 0
    if args.save_total_limit is not None:
        # The oldest checkpoint is deleted after the newest is complete.
        room = args.save_total_limit + 1 - len(list_checkpoints(args.run_dir))
        num_checkpoints = min(num_checkpoints, max(1, room))
    resume = plan.resume
    is_converted_here = (
        resume is not None
        and resume.is_resharded
        and resume.folder.parent.resolve() == args.run_dir.resolve()
        and not (resume.folder / UNIVERSAL_TAG).is_dir()
    )
    checkpoint = sizes.num_trained * (STATE_BYTES + (width if _holds_weights(plan) else 0))
    return DiskUsage(
        num_checkpoints=num_checkpoints,
        checkpoint=checkpoint,
        model=width * (sizes.num_parameters if plan.adapters is None else sizes.num_parameters + sizes.num_trained),
        converted=checkpoint if is_converted_here else 0,
    )


def check_disk(folder: Path, usage: DiskUsage) -> list[str]:
    """Check that the disk has room for a run.

    Args:
        folder: folder of the run; it need not exist.
        usage: peak disk usage of the run.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    files = (
        f"{usage.num_checkpoints} x {usage.checkpoint / GIB:.2f} GiB of checkpoints and {usage.model / GIB:.2f} GiB of "
        "trained model"
    )
    if usage.converted:
        files = f"{usage.converted / GIB:.2f} GiB of resharded checkpoint, {files}"
    logger.info("disk: the run writes up to %s to %s, which has %.1f GiB free", files, folder, free / GIB)
    if usage.num_bytes <= free:
        return []
    return [
        f"{files} do not fit {folder}, which has {free / GIB:.2f} GiB free: free some space, keep fewer checkpoints "
        "(--save_total_limit), or use another --output_dir"
    ]
