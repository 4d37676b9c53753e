"""Whether there is room for a run: what it takes of device, host and disk, and what these have -> problems, in words.

Cost: none.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from storage.disk import nearest_existing
from train.memory.states import DEVICE, GIB, MOMENTS, Memory, Phase
from train.model.sizes import Sizes
from train.run.plan import Plan
from train.run.run_dir import UNIVERSAL_TAG, list_checkpoints

logger = logging.getLogger(__name__)

HOST = "cpu"
"""Where DeepSpeed offloads to in memory; the other place is ``nvme``."""

STATE_BYTES = 12
"""Of a trained parameter in a checkpoint, at any ZeRO stage: float32 weight and both moments of AdamW."""

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Control groups of Linux (version 2), and a file that says which one this process is in."""


def device_bytes(device: torch.device) -> int:
    """What this process can have of a CUDA device: what is free and what torch holds already.

    The context of CUDA, buffers of NCCL and other processes are off.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def host_bytes() -> int:
    """Memory of this machine, or as much of it as the container or job of this process may have."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):  # no control groups
        entries = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
        for own in (CGROUPS / path.lstrip("/") for number, _, path in entries if number == "0"):
            for group in (own, *own.parents):
                with suppress(OSError, ValueError):  # there is none, or it is "max"
                    limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def check_held(memory: Memory, available: int) -> list[str]:
    """Whether weights, gradients and optimizer states fit the device, before anything is loaded.

    Args:
        memory: of a rank.
        available: bytes of its device.
    """
    if memory.held() <= available:
        return []
    return [
        f"weights, gradients and optimizer states take {memory.held() / GIB:.1f} GiB of a device that has "
        f"{available / GIB:.1f} GiB: take a higher ZeRO stage, more ranks, offloading or LoRA"
    ]


def check_device(memory: Memory, peak: int, available: int) -> list[str]:
    """Whether a step fits the device, by what was seen of its backward pass and what was worked out of the rest.

    Args:
        memory: as worked out.
        peak: bytes that a forward and a backward pass took at most. The moments of the optimizer are not there yet:
            its first step makes them.
        available: bytes of the device.
    """
    terms = [term for term in memory.terms if term.place == DEVICE]
    moments = sum(term.num_bytes for term in terms if term.name == MOMENTS)
    step = memory.held() + sum(term.num_bytes for term in terms if term.phase == Phase.STEP)
    needed = max(peak + moments, step)
    logger.info(
        "of %.1f GiB a step takes %.1f GiB: %.1f GiB were seen, moments of AdamW add %.1f GiB; worked out: %.1f GiB",
        *(size / GIB for size in (available, needed, peak, moments, memory.peak())),
    )
    if needed <= available:
        return []
    return [
        f"a step takes {needed / GIB:.1f} GiB of a device that has {available / GIB:.1f} GiB: lower "
        "--per_device_train_batch_size and raise --gradient_accumulation_steps, or take a higher ZeRO stage, more "
        "ranks or offloading"
    ]


def check_host(memory: Memory, num_ranks: int, available: int) -> list[str]:
    """Whether what ranks offload fits the memory of their machine.

    Args:
        memory: of a rank.
        num_ranks: on this machine.
        available: bytes of its memory.
    """
    of_rank = memory.peak(HOST)
    if num_ranks * of_rank <= available:
        return []
    return [
        f"offloading takes {num_ranks * of_rank / GIB:.1f} GiB of a machine that has {available / GIB:.1f} GiB "
        f"({num_ranks} ranks with {of_rank / GIB:.1f} GiB each): take more machines, or offload less"
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a run adds to its folder, at most at a time.

    Attributes:
        num_checkpoints: checkpoints to resume from.
        checkpoint: bytes of each.
        model: bytes of the trained model, and of its adapters.
        converted: bytes of a checkpoint of another number of ranks in its universal form; 0 where none is made.
    """

    num_checkpoints: int
    checkpoint: int
    model: int
    converted: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all that."""
        return self.num_checkpoints * self.checkpoint + self.model + self.converted


def written(plan: Plan, sizes: Sizes) -> Written:
    """What a run is going to write.

    Args:
        plan: the run.
        sizes: of its model, as it is trained.
    """
    args, width = plan.args, plan.compute.dtype.itemsize
    saves = plan.num_steps // args.save_steps - plan.start_step // args.save_steps if args.save_steps else 0
    num_checkpoints = max(1, saves)  # a run that is told to stop saves one in any case
    if args.save_total_limit is not None:
        # The oldest one goes when the newest is complete.
        room = args.save_total_limit + 1 - len(list_checkpoints(args.run_dir))
        num_checkpoints = max(1, min(num_checkpoints, room))
    # ZeRO-3 leaves it at the float32 weights.
    holds_weights = plan.deepspeed["zero_optimization"]["stage"] < 3
    resume = plan.resume
    is_converted_here = (
        resume is not None
        and resume.is_resharded
        and resume.folder.parent.resolve() == args.run_dir.resolve()
        and not (resume.folder / UNIVERSAL_TAG).is_dir()
    )
    return Written(
        num_checkpoints=num_checkpoints,
        checkpoint=sizes.num_trained * (STATE_BYTES + (width if holds_weights else 0)),
        model=width * (sizes.num_parameters if plan.adapters is None else sizes.num_parameters + sizes.num_trained),
        converted=sizes.num_trained * STATE_BYTES if is_converted_here else 0,
    )


def check_disk(folder: Path, plans: Written) -> list[str]:
    """Whether there is room for what a run writes.

    Args:
        folder: of the run; it need not be there.
        plans: what is going to be written.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    what = (
        f"{plans.num_checkpoints} x {plans.checkpoint / GIB:.2f} GiB of checkpoints and {plans.model / GIB:.2f} GiB of "
        "the trained model"
    )
    if plans.converted:
        what = f"{plans.converted / GIB:.2f} GiB of the checkpoint to go on from, dealt out anew, {what}"
    logger.info("the run writes up to %s to %s, where %.1f GiB are free", what, folder, free / GIB)
    if plans.num_bytes <= free:
        return []
    return [
        f"{what} do not fit {folder}, where {free / GIB:.2f} GiB are free: make room, keep fewer checkpoints "
        "(--save_total_limit), or give another --output_dir"
    ]
