"""Parameter counts of a run: the table of weights and what the flags train -> :class:`Sizes`.

No model is built: with adapters in every layer of the 72B that took 6 s. Tests compare every field with the parameters
and parameter groups of real models, tied embeddings and adapters included.

Cost: about a millisecond; with adapters, a tenth of a second for the names of the layers that get them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from train.arithmetic.dimensions import Dimensions
from train.arithmetic.weights import Kind, weight_table
from train.model import adapters, optim
from train.settings.arguments import TrainArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Parameter counts that memory depends on, over all ranks.

    Attributes:
        dims: dimensions of the model.
        elements: scalars of every parameter; a tied one counts once.
        num_trained: scalars of all trained parameters.
        largest_group: scalars of the largest trained parameter group.
        largest_trained: scalars of the largest trained parameter.
        largest_module: scalars of the parameters that a single module holds, at most.
        trained_parts: parts of the model that are trained, directly or by adapters.
    """

    dims: Dimensions
    elements: tuple[int, ...]
    num_trained: int
    largest_group: int
    largest_trained: int
    largest_module: int
    trained_parts: frozenset[str]

    @property
    def num_parameters(self) -> int:
        """Scalars of all parameters."""
        return sum(self.elements)

    @property
    def trains_tied_embeddings(self) -> bool:
        """Whether the embeddings are trained and share their weight with ``lm_head``."""
        return self.dims.has_tied_embeddings and self.largest_trained == self.dims.vocab_size * self.dims.hidden_size

    def num_in_small(self, max_elements: int) -> int:
        """Scalars of all parameters with at most ``max_elements`` each."""
        return sum(count for count in self.elements if count <= max_elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Module:
    """A module with parameters: scalars of its weight and its bias, and which parameter groups these belong to."""

    part: str
    is_adapter: bool
    weight: int
    bias: int
    weight_decays: bool


def sizes_of(config: Mapping[str, Any], args: TrainArguments) -> Sizes:
    """Parameter counts of the model that a run trains.

    Args:
        config: contents of ``config.json``.
        args: the flags, which say what is trained.

    Raises:
        ConfigError: the flags do not fit the model.
    """
    dims = Dimensions.of(config)
    chosen = adapters.choose_adapters(args, config)
    modules = [*_own_modules(dims), *_adapter_modules(dims, chosen)]
    trained_parts = frozenset(part for part, rate in optim.learning_rates(args, 1.0).items() if rate is not None)
    groups: Counter[tuple[str, bool]] = Counter()
    largest_trained = 0
    for module in modules:
        if module.part in trained_parts and module.is_adapter == (chosen is not None):
            groups[module.part, module.weight_decays] += module.weight
            groups[module.part, False] += module.bias
            largest_trained = max(largest_trained, module.weight, module.bias)
    return Sizes(
        dims=dims,
        elements=tuple(count for module in modules for count in (module.weight, module.bias) if count),
        num_trained=groups.total(),
        largest_group=max(groups.values()),
        largest_trained=largest_trained,
        largest_module=max(module.weight + module.bias for module in modules),
        trained_parts=trained_parts,
    )


def _own_modules(dims: Dimensions) -> Iterator[_Module]:
    for row in weight_table(dims):
        if not row.is_tied:
            module = _Module(
                part=optim.part_of(f"hf.{row.name}."),
                is_adapter=False,
                weight=row.num_elements,
                bias=row.outputs if row.has_bias else 0,
                weight_decays=row.kind != Kind.NORM,
            )
            yield from [module] * row.copies


def _adapter_modules(dims: Dimensions, chosen: adapters.Adapters | None) -> Iterator[_Module]:
    """Both matrices of every adapter."""
    if chosen is None:
        return
    rows = {row.name.format(layer): row for row in weight_table(dims) for layer in range(row.copies)}
    for name in chosen.modules:
        part = optim.part_of(f"hf.{name}.")
        for width in (rows[name].inputs, rows[name].outputs):
            yield _Module(part=part, is_adapter=True, weight=chosen.rank * width, bias=0, weight_decays=True)
