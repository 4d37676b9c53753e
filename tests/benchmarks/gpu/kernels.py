"""Single kernels: a number of patches -> what each takes, forward and backward where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from schemas.bins import MEDIA_IMAGE
from schemas.qwen import PATCH_DIM, PATCH_SIZE, Grid
from tests.benchmarks.gpu.models import DTYPE
from train.batches.batch import VisionBatch
from train.model.packed import PatchProjection
from train.model.pixels import pixel_values, undo_residuals

WIDTH = 1280
"""Output of the patch projection in every Qwen2.5-VL."""

SIDE = 32
"""Patches of a side of the images."""

NUM_REPEATS = 5


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median over some runs, after one that does not count."""
    times = []
    for repeat in range(NUM_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times.append(time.perf_counter() - start_s)
    return sorted(times)[NUM_REPEATS // 2]


def measure_kernels(num_patches: int, device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield each kernel and its figure."""
    yield from _projection(num_patches, device)
    yield from _pixels(max(1, num_patches // SIDE**2), device)


def _projection(num_patches: int, device: torch.device) -> Iterator[tuple[str, str]]:
    """The convolution of transformers, and the product that replaces it, with their backward passes."""
    kernel = (2, PATCH_SIZE, PATCH_SIZE)
    conv = nn.Conv3d(3, WIDTH, kernel, stride=kernel, bias=False, device=device, dtype=DTYPE)  # type: ignore[arg-type]
    patches = torch.randn(num_patches, 3, *kernel, device=device, dtype=DTYPE)
    for name, module in (("patch projection, Conv3d", conv), ("patch projection, product", PatchProjection.of(conv))):
        elapsed_s = seconds(partial(_forward_backward, module, patches), device)
        flops = 2 * 2 * num_patches * PATCH_DIM * WIDTH  # forward, and the gradient of the weight
        yield name, f"{elapsed_s * 1e3:10.3f} ms {flops / elapsed_s / 1e12:8.2f} TFLOP/s"


def _forward_backward(module: nn.Module, patches: torch.Tensor) -> None:
    module(patches).sum().backward()


def _copy(source: torch.Tensor, device: torch.device) -> None:
    torch.empty_like(source, device=device).copy_(source, non_blocking=True)


def _pixels(num_images: int, device: torch.device) -> Iterator[tuple[str, str]]:
    """Copying stored pixels to the device, undoing residuals, and making ``pixel_values`` of them."""
    shape = (num_images, 3, SIDE * PATCH_SIZE, SIDE * PATCH_SIZE)
    host = torch.randint(0, 256, shape, dtype=torch.uint8)
    sources = {"pageable": host, **({"pinned": host.pin_memory()} if device.type == "cuda" else {})}
    for name, source in sources.items():
        elapsed_s = seconds(partial(_copy, source, device), device)
        yield f"copy to the device, {name}", f"{elapsed_s * 1e3:10.3f} ms {host.numel() / elapsed_s / 1e9:8.2f} GB/s"
    planes = host.to(device)
    elapsed_s = seconds(lambda: undo_residuals(planes), device)
    yield "undoing residuals", f"{elapsed_s * 1e3:10.3f} ms {host.numel() / elapsed_s / 1e9:8.2f} GB/s"
    vision = _vision_batch(planes.flatten(), num_images)
    elapsed_s = seconds(lambda: pixel_values(vision, DTYPE), device)
    yield "pixel values, residuals included", f"{elapsed_s * 1e3:10.3f} ms {host.numel() / elapsed_s / 1e9:8.2f} GB/s"


def _vision_batch(planes: torch.Tensor, num_images: int) -> VisionBatch:
    """Images alone: :func:`pixel_values` needs nothing else."""
    nothing = torch.empty(0)
    return VisionBatch(
        planes=planes,
        residuals=True,
        media=((Grid(1, SIDE, SIDE), MEDIA_IMAGE),) * num_images,
        position_ids=nothing,
        cu_seqlens=nothing,
        max_seqlen=0,
        window_index=nothing,
        cu_window_seqlens=nothing,
        max_window_seqlen=0,
        num_patches=num_images * SIDE**2,
    )
