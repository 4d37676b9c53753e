"""Memory of weights, gradients and optimizer states: parameter counts and DeepSpeed's configuration -> memory terms.

The terms are the buffers that DeepSpeed 0.19 allocates (``BF16_Optimizer`` for stage 1 in bfloat16, else
``stage_1_and_2.py`` and ``stage3.py``), exact to padding. Transient buffers are estimates.

Not included: the CUDA context and NCCL's buffers (1 to 2 GiB), and fragmentation.

Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from train.memory.terms import DEVICE, Phase, Term
from train.model.sizes import Sizes

MOMENTS = "AdamW moments"

BF16_BUCKET = 500_000_000
"""Scalars of a gradient bucket of ``BF16_Optimizer``: ``MEMORY_OPT_ALLREDUCE_SIZE`` of DeepSpeed's engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The part of DeepSpeed's configuration that memory depends on.

    Attributes:
        stage: ZeRO stage.
        world: number of ranks.
        dtype: dtype of the computation.
        accumulation_dtype: dtype that gradients are accumulated in.
        optimizer_location: where optimizer states are held.
        parameter_location: where weights are held.
        bucket: scalars of a gradient bucket.
        num_buckets: gradient buckets that exist at a time.
        prefetch_bucket: stage 3: scalars that are prefetched.
        persistence_threshold: stage 3: smaller parameters are not partitioned.
        max_live: stage 3: scalars that stay gathered, at most.
        sub_group: stage 3: scalars that the optimizer steps at a time.
        secondary_ranks: stage 3: ranks that a second copy of the weights is partitioned over; 1 without one.
        is_fused: whether AdamW steps without temporaries.
    """

    stage: int
    world: int
    dtype: torch.dtype
    accumulation_dtype: torch.dtype
    optimizer_location: str
    parameter_location: str
    bucket: int
    num_buckets: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    sub_group: int
    secondary_ranks: int
    is_fused: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], *, world: int, dtype: torch.dtype, is_fused: bool) -> Sharding:
        """Read a complete configuration. Missing keys get the defaults of DeepSpeed 0.19."""
        zero = config["zero_optimization"]
        stage = zero["stage"]
        overlaps = zero.get("overlap_comm", stage == 3)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return cls(
            stage=stage,
            world=world,
            dtype=dtype,
            accumulation_dtype=dtypes[config["data_types"]["grad_accum_dtype"]],
            optimizer_location=_offload_location(zero, "offload_optimizer"),
            parameter_location=_offload_location(zero, "offload_param"),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            num_buckets=2 if overlaps and stage < 3 else 1,
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            secondary_ranks=min(world, int(zero.get("zero_hpz_partition_size", 1))),
            is_fused=is_fused,
        )

    @property
    def uses_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed uses its optimizer that keeps unpartitioned float32 gradients on every rank."""
        return self.stage == 1 and self.dtype == torch.bfloat16 and self.optimizer_location == DEVICE


def _offload_location(zero: Mapping[str, Any], section: str) -> str:
    device = (zero.get(section) or {}).get("device", "none")
    return DEVICE if device == "none" else str(device)


def state_terms(sizes: Sizes, sharding: Sharding) -> list[Term]:
    """Weights, gradients, optimizer states and DeepSpeed's buffers."""
    terms = _stage_3(sizes, sharding) if sharding.stage == 3 else _stage_1_or_2(sizes, sharding)
    # The gradient, and its copy in the dtype or the buffer in which it is accumulated or reduced.
    share = (sharding.dtype.itemsize, sizes.largest_trained, 1)
    terms.append(_term("largest gradient and its copy", share, 2, phase=Phase.TRANSIENT))
    if sizes.trains_tied_embeddings and not sharding.uses_bf16_optimizer:
        terms.append(_term("gradient of lm_head, until that of the embeddings", share, phase=Phase.BACKWARD))
    return terms


def _stage_1_or_2(sizes: Sizes, sharding: Sharding) -> list[Term]:
    width, trained, world = sharding.dtype.itemsize, sizes.num_trained, sharding.world
    terms = [
        _term("weights", (width, sizes.num_parameters, 1)),
        *_optimizer_terms(sizes, sharding),
        *_gradient_terms(sizes, sharding),
    ]
    if sharding.optimizer_location != DEVICE:
        host = sharding.optimizer_location
        terms.append(_term("host-to-device staging buffer", (width, trained, world), location=host))
        for location in (DEVICE, host):
            terms.append(_term("gradient staging buffer", (width, sizes.largest_trained, 1), location=location))
    if not sharding.uses_bf16_optimizer:
        casts = sharding.stage == 1 and sharding.accumulation_dtype != sharding.dtype
        share = (sharding.accumulation_dtype.itemsize if casts else width, sharding.bucket, 1)
        terms.append(_term("gradient buckets", share, sharding.num_buckets, phase=Phase.BACKWARD))
        terms.append(_term("copy of a bucket that is reduced", share, phase=Phase.BACKWARD))
    return terms


def _gradient_terms(sizes: Sizes, sharding: Sharding) -> list[Term]:
    """Gradients at stages 1 and 2."""
    width, accumulated_width = sharding.dtype.itemsize, sharding.accumulation_dtype.itemsize
    trained, world = sizes.num_trained, sharding.world
    casts = sharding.accumulation_dtype != sharding.dtype
    if sharding.uses_bf16_optimizer:
        # DeepSpeed fills a bucket of the reduction until it is larger than this, then casts it to the dtype in which
        # it travels. The gradients of the last micro-batch are freed after the step.
        bucket = min(trained, BF16_BUCKET + sizes.largest_trained)
        return [
            _term("accumulated gradients", (accumulated_width, trained, 1)),
            _term("micro-batch gradients", (width, trained, 1)),
            _term("gradients that are reduced", (accumulated_width + width, bucket, 1), phase=Phase.STEP),
        ]
    if sharding.stage == 1:
        return [_term("gradients", (accumulated_width if casts else width, trained, 1), phase=Phase.BACKWARD)]
    terms = [_term("gradients", (accumulated_width, trained, world), phase=Phase.BACKWARD)]
    if not casts:
        # A tensor that crosses the boundary of a partition is not split.
        crossing = min(sizes.largest_trained, trained - trained // world)
        terms.append(_term("gradients across boundaries", (width, crossing, 1), phase=Phase.BACKWARD))
    return terms


def _stage_3(sizes: Sizes, sharding: Sharding) -> list[Term]:
    width, total = sharding.dtype.itemsize, sizes.num_parameters
    trained, world = sizes.num_trained, sharding.world
    location = sharding.parameter_location
    terms = [_term("weights", (width, total, world), location=location)]
    if location != DEVICE:
        terms.append(_term("second copy of trained weights", (width, trained, world), location=location))
    if (ranks := sharding.secondary_ranks) > 1:
        terms.append(_term("weights within a group of ranks", (width, total, ranks), location=location))
    small = sizes.num_in_small(sharding.persistence_threshold)
    gathered = min(total, max(sharding.max_live, sizes.largest_module))
    gradients = (sharding.accumulation_dtype.itemsize, trained, world)
    return [
        *terms,
        _term("unpartitioned small weights", (width, small, 1)),
        *_optimizer_terms(sizes, sharding),
        _term("gradients", gradients, location=sharding.optimizer_location),
        _term("gradient bucket", (width, sharding.bucket, 1)),
        _term("copy of a bucket that is reduced", (width, sharding.bucket, 1), phase=Phase.BACKWARD),
        _term("gathered weights, at most", (width, gathered, 1), phase=Phase.BACKWARD),
        _term("prefetched weights", (width, min(total, sharding.prefetch_bucket), 1), phase=Phase.BACKWARD),
    ]


def _optimizer_terms(sizes: Sizes, sharding: Sharding) -> list[Term]:
    """Float32 weights and moments of this rank's partition, and the temporaries of an AdamW step."""
    location, world, trained = sharding.optimizer_location, sharding.world, sizes.num_trained
    terms = [
        _term("float32 weights", (4, trained, world), location=location),
        _term(MOMENTS, (4, trained, world), 2, location=location),
    ]
    if location != DEVICE:
        return [*terms, _term("float32 gradients", (4, trained, world), location=location)]
    stepped = sizes.largest_group // world
    if sharding.stage == 3:
        stepped = min(stepped, sharding.sub_group)
    if not sharding.uses_bf16_optimizer:
        terms.append(_term("float32 gradients of a group", (4, stepped, 1), phase=Phase.STEP))
    if not sharding.is_fused:
        terms.append(_term("AdamW denominators", (4, stepped, 1), phase=Phase.STEP))
    return terms


def _term(
    name: str, share: tuple[int, int, int], times: int = 1, *, location: str = DEVICE, phase: Phase = Phase.ALWAYS
) -> Term:
    """A term of ``times`` shares: ``(bytes of a scalar, scalars, ranks that they are partitioned over)``."""
    width, count, ranks = share
    formula = f"{width} B x {_format_count(count)}"
    if times > 1:
        formula = f"{times} x {formula}"
    if ranks > 1:
        formula += f" / {ranks} ranks"
    num_bytes = times * width * -(-count // ranks)
    return Term(name=name, num_bytes=num_bytes, formula=formula, location=location, phase=phase)


def _format_count(count: int) -> str:
    for size, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.4g} {prefix}"
    return str(count)
