"""The DeepSpeed engine: model, optimizer and configuration -> an :class:`Engine`; gathering its weights at the end.

:class:`Engine` lists everything that the trainer uses of DeepSpeed's own, untyped class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from schemas.seeds import seed_for
from train.batches.batch import MicroBatch
from train.model.packed import PackedQwen
from train.run.process_group import Ranks
from train.settings.deepspeed_file import with_universal_checkpoint


class LossScaler(Protocol):
    """Scale of the loss in float16. Only a dynamic scaler has the two scales and the switch."""

    dynamic: bool
    cur_scale: float
    min_scale: float
    raise_error_at_min_scale: bool


class ZeroOptimizer(Protocol):
    """DeepSpeed's wrapper around the optimizer."""

    overflow: bool
    """Whether the last step was skipped because the norm of its gradient was not finite."""

    loss_scaler: LossScaler
    """Only in float16 does every ZeRO stage have one."""


class Engine(Protocol):
    """What the trainer uses of ``deepspeed.DeepSpeedEngine``."""

    module: PackedQwen
    device: torch.device
    optimizer: ZeroOptimizer
    checkpoint_engine: object
    """Writes the files of a checkpoint."""

    def __call__(self, micro: MicroBatch, *, scores: bool = False) -> torch.Tensor:
        """Forward pass of the module, see :meth:`PackedQwen.forward`."""

    def train(self) -> object:
        """Switch to training mode."""

    def eval(self) -> object:
        """Switch to evaluation mode."""

    def backward(self, loss: torch.Tensor) -> object:
        """Accumulate the gradient of a micro-batch."""

    def step(self) -> None:
        """End a micro-step. The last one of a step updates the weights."""

    def get_global_grad_norm(self) -> torch.Tensor | float:
        """Norm of the gradient of the last step, over all ranks and before clipping."""

    def fp16_enabled(self) -> bool:
        """Whether the engine computes in float16."""

    def save_checkpoint(self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> object:
        """Write the state of this rank to ``save_dir/tag``. Collective."""

    def load_checkpoint(
        self, load_dir: str, *, tag: str, custom_load_fn: Callable[..., None]
    ) -> tuple[str | None, object]:
        """Read what :meth:`save_checkpoint` wrote. Collective. The path is None if there is no such state."""


def register_zero3_loading(config: dict[str, Any]) -> object:
    """Let transformers load weights straight into partitions under ZeRO-3.

    Returns:
        A registration, which transformers holds weakly: keep it alive as long as models are loaded or saved.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    registration: object = HfDeepSpeedConfig(config)
    return registration


def initialize(
    model: PackedQwen, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, is_resharded: bool = False
) -> Engine:
    """Wrap the model into a DeepSpeed engine. Collective.

    Args:
        model: the model.
        optimizer: over its parameters; the trainer sets the learning rates.
        config: complete configuration.
        is_resharded: whether a checkpoint of another number of ranks will be loaded.
    """
    import deepspeed

    if is_resharded:
        config = with_universal_checkpoint(config)
    engine: Engine
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if engine.fp16_enabled() and engine.optimizer.loss_scaler.dynamic:
        # SkippedSteps decides what an overflow at the lowest scale means: it can name the bins.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def seed_dropout(seed: int, ranks: Ranks, step: int) -> None:
    """Seed dropout, the only random draw of a training step, for this rank and a start at ``step``."""
    torch.manual_seed(seed_for(seed, "dropout", str(ranks.rank), str(step)) % 2**64)


def can_lower_scale(engine: Engine) -> bool:
    """Whether an overflow in the next step would lower the loss scale, so that later gradients may fit.

    True in float16 until the scale has reached ``min_loss_scale``. A fixed ``loss_scale`` is never lowered.
    """
    if not engine.fp16_enabled():
        return False
    scaler = engine.optimizer.loss_scaler
    return scaler.dynamic and scaler.cur_scale > scaler.min_scale


def frozen_names(module: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not trained, all names of tied ones."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def gather_weights(module: torch.nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gather the full weights on the CPU of the first rank, by name, tied weights once. Collective.

    Returns:
        The weights on the first rank; nothing on the others.
    """
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if ranks.is_first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
