"""Memory of a rank, term by term: sizes of a model and DeepSpeed's configuration -> weights, gradients, states.

It follows the buffers that DeepSpeed 0.19 makes (its ``BF16_Optimizer`` for stage 1 in bfloat16, else
``stage_1_and_2.py`` and ``stage3.py``), exact to padding. What lives for a moment only is estimated; of such terms the
largest one counts. :mod:`train.memory.activations` has what the micro-batch adds, :mod:`train.memory.budget` puts both
together.

Not in it: the CUDA context and NCCL's buffers (1 to 2 GiB) and what the allocator loses to fragmentation.

Cost: none.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from train.model.sizes import Sizes

GIB = 1 << 30
DEVICE = "device"
"""Where the accelerator computes; the other places are those of DeepSpeed's offloading: ``cpu`` and ``nvme``."""

MOMENTS = "moments of AdamW"


class Phase(enum.Enum):
    """When memory is held."""

    ALWAYS = "always"
    BACKWARD = "from the forward to the end of the backward pass"
    MOMENT = "for a moment of it"
    STEP = "during the optimizer step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """Memory of one kind.

    Attributes:
        name: what it holds.
        num_bytes: how many bytes.
        arithmetic: how that comes about.
        place: where they lie.
        phase: when.
    """

    name: str
    num_bytes: int
    arithmetic: str
    place: str = DEVICE
    phase: Phase = Phase.ALWAYS


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What of DeepSpeed's configuration decides memory.

    Attributes:
        stage: ZeRO stage.
        world: number of ranks.
        dtype: what is computed in.
        accumulation_dtype: what gradients are added up in.
        optimizer_place: where optimizer states lie.
        parameter_place: where weights lie.
        bucket: scalars of a bucket of gradients.
        num_buckets: of them at a time.
        prefetch_bucket: stage 3: scalars gathered ahead.
        persistence_threshold: stage 3: smaller parameters are not partitioned.
        max_live: stage 3: scalars that stay gathered at most.
        sub_group: stage 3: scalars that are stepped together.
    """

    stage: int
    world: int
    dtype: torch.dtype
    accumulation_dtype: torch.dtype
    optimizer_place: str
    parameter_place: str
    bucket: int
    num_buckets: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    sub_group: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, world: int, dtype: torch.dtype) -> Sharding:
        """Read a complete configuration; what it leaves out has the defaults of DeepSpeed 0.19."""
        zero = config["zero_optimization"]
        stage = zero["stage"]
        overlaps = zero.get("overlap_comm", stage == 3)
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return cls(
            stage=stage,
            world=world,
            dtype=dtype,
            accumulation_dtype=kinds[config["data_types"]["grad_accum_dtype"]],
            optimizer_place=_offload(zero, "offload_optimizer"),
            parameter_place=_offload(zero, "offload_param"),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            num_buckets=2 if overlaps and stage < 3 else 1,
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
        )

    @property
    def uses_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes its optimizer that keeps whole float32 gradients on every rank."""
        return self.stage == 1 and self.dtype == torch.bfloat16 and self.optimizer_place == DEVICE


@dataclass(frozen=True, slots=True)
class Memory:
    """All terms of a rank."""

    terms: tuple[Term, ...]

    def held(self, place: str = DEVICE) -> int:
        """Bytes that are held all the time."""
        return self._sum(place, Phase.ALWAYS)

    def peak(self, place: str = DEVICE) -> int:
        """Most bytes at a time."""
        moments = [term.num_bytes for term in self.terms if term.place == place and term.phase == Phase.MOMENT]
        backward = self._sum(place, Phase.BACKWARD) + max(moments, default=0)
        return self.held(place) + max(backward, self._sum(place, Phase.STEP))

    def format(self) -> str:
        """All terms and their sums, for a person."""
        places = dict.fromkeys(term.place for term in self.terms)
        lines = []
        for place in places:
            for phase in Phase:
                terms = [term for term in self.terms if (term.place, term.phase) == (place, phase)]
                if terms:
                    lines.append(f"{place}, {phase.value}:")
                lines += [f"  {term.num_bytes / GIB:9.3f} GiB  {term.name:<30}  {term.arithmetic}" for term in terms]
            total = f"{place}, most at a time"
            lines.append(f"  {self.peak(place) / GIB:9.3f} GiB  {total:<30}  {self._explain_peak(place)}")
        return "\n".join(lines)

    def _explain_peak(self, place: str) -> str:
        phases = {term.phase for term in self.terms if term.place == place}
        if phases == {Phase.ALWAYS}:
            return "the sum"
        return "always + the larger of: backward pass with its largest moment; optimizer step"

    def _sum(self, place: str, phase: Phase) -> int:
        return sum(term.num_bytes for term in self.terms if (term.place, term.phase) == (place, phase))


def state_terms(sizes: Sizes, sharding: Sharding) -> list[Term]:
    """Weights, gradients, optimizer and DeepSpeed's buffers."""
    if sharding.stage == 3:
        return _stage_3(sizes, sharding)
    terms = _optimizer_terms(sizes, sharding)
    width, of_sums = sharding.dtype.itemsize, sharding.accumulation_dtype.itemsize
    total, trained, world = sizes.num_parameters, sizes.num_trained, sharding.world
    terms.insert(0, _term("weights", (width, total, 1)))
    summed = sharding.accumulation_dtype != sharding.dtype
    if sharding.uses_bf16_optimizer:
        terms.append(_term("gradients, added up", (of_sums, trained, 1)))
        terms.append(_term("gradients of a pass", (width, trained, 1), phase=Phase.BACKWARD))
    elif sharding.stage == 1:
        terms.append(_term("gradients", (of_sums if summed else width, trained, 1), phase=Phase.BACKWARD))
    else:
        terms.append(_term("gradients", (of_sums, trained, world), phase=Phase.BACKWARD))
        if not summed:
            # Tensors at the borders of a partition are kept whole.
            whole = min(sizes.largest_trained, trained - trained // world)
            terms.append(_term("gradients across borders", (width, whole, 1), phase=Phase.BACKWARD))
    if sharding.optimizer_place != DEVICE:
        host = sharding.optimizer_place
        terms.append(_term("weights on their way back", (width, trained, world), place=host))
        for place in (DEVICE, host):
            terms.append(_term("gradient on its way", (width, sizes.largest_trained, 1), place=place))
    if not sharding.uses_bf16_optimizer:
        staged = of_sums if sharding.stage == 1 and summed else width
        terms.append(
            _term("buckets of gradients", (staged, sharding.bucket, 1), sharding.num_buckets, phase=Phase.BACKWARD)
        )
    terms.append(_gradient_in_the_making(sizes, sharding))
    return terms


def _stage_3(sizes: Sizes, sharding: Sharding) -> list[Term]:
    terms = _optimizer_terms(sizes, sharding)
    width, of_sums = sharding.dtype.itemsize, sharding.accumulation_dtype.itemsize
    total, trained, world = sizes.num_parameters, sizes.num_trained, sharding.world
    place = sharding.parameter_place
    weights = [_term("weights", (width, total, world), place=place)]
    if place != DEVICE:
        weights.append(_term("weights, trained, once more", (width, trained, world), place=place))
    small = sizes.num_in_small(sharding.persistence_threshold)
    weights.append(_term("weights too small to divide", (width, small, 1)))
    gathered = min(total, max(sharding.max_live, sizes.largest_module))
    gradients = _term("gradients", (of_sums, trained, world), place=sharding.optimizer_place)
    return [
        *weights,
        *terms,
        gradients,
        _term("bucket of gradients", (width, sharding.bucket, 1)),
        _term("weights gathered, at most", (width, gathered, 1), phase=Phase.BACKWARD),
        _term("weights gathered ahead", (width, min(total, sharding.prefetch_bucket), 1), phase=Phase.BACKWARD),
        _gradient_in_the_making(sizes, sharding),
    ]


def _optimizer_terms(sizes: Sizes, sharding: Sharding) -> list[Term]:
    """Float32 weights and moments of this rank's share, and what a step of AdamW needs beside them."""
    place, world, trained = sharding.optimizer_place, sharding.world, sizes.num_trained
    terms = [
        _term("float32 weights", (4, trained, world), place=place),
        _term(MOMENTS, (4, trained, world), 2, place=place),
    ]
    if place != DEVICE:
        return [*terms, _term("float32 gradients", (4, trained, world), place=place)]
    at_once = sizes.largest_group // world
    if sharding.stage == 3:
        at_once = min(at_once, sharding.sub_group)
    if not sharding.uses_bf16_optimizer:
        terms.append(_term("float32 gradients of a group", (4, at_once, 1), phase=Phase.STEP))
    return [*terms, _term("roots of a group's moments", (4, at_once, 1), phase=Phase.STEP)]


def _gradient_in_the_making(sizes: Sizes, sharding: Sharding) -> Term:
    """``lm_head`` gets its gradient in chunks, which are added up: the sum so far, and the next one."""
    return _term(
        "largest gradient, in parts",
        (sharding.dtype.itemsize, sizes.largest_trained, 1),
        2,
        phase=Phase.MOMENT,
    )


def _offload(zero: Mapping[str, Any], key: str) -> str:
    place = (zero.get(key) or {}).get("device", "none")
    return DEVICE if place == "none" else str(place)


def _term(
    name: str, share: tuple[int, int, int], times: int = 1, *, place: str = DEVICE, phase: Phase = Phase.ALWAYS
) -> Term:
    """Bytes of a share: ``(bytes of a scalar, scalars, ranks that share them)``."""
    width, number, ranks = share
    arithmetic = f"{width} B x {_count(number)}"
    if times > 1:
        arithmetic = f"{times} x {arithmetic}"
    if ranks > 1:
        arithmetic += f" / {ranks} ranks"
    return Term(
        name=name, num_bytes=times * width * -(-number // ranks), arithmetic=arithmetic, place=place, phase=phase
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)
