"""Memory of a rank as a sum of terms: :class:`Term` -> :class:`Memory`, its peak, and a table of all terms.

Cost: none.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

GIB = 1 << 30

DEVICE, HOST = "device", "cpu"
"""Locations of memory: the accelerator, and where DeepSpeed offloads to (``cpu``, or ``nvme``)."""


class Phase(enum.Enum):
    """When memory is held."""

    ALWAYS = "always"
    BACKWARD = "forward and backward pass"
    TRANSIENT = "transient, during the backward pass"
    STEP = "optimizer step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """Memory of one kind.

    Attributes:
        name: what it holds.
        num_bytes: its size.
        formula: how the size is worked out.
        location: where it is held.
        phase: when it is held.
    """

    name: str
    num_bytes: int
    formula: str
    location: str = DEVICE
    phase: Phase = Phase.ALWAYS


@dataclass(frozen=True, slots=True)
class Memory:
    """All terms of a rank."""

    terms: tuple[Term, ...]

    def held(self, location: str = DEVICE) -> int:
        """Bytes that are always held."""
        return self._sum(location, Phase.ALWAYS)

    def peak(self, location: str = DEVICE) -> int:
        """Most bytes at any time. Transient terms exclude each other, so only the largest counts."""
        transient = max((term.num_bytes for term in self._select(location, Phase.TRANSIENT)), default=0)
        backward = self._sum(location, Phase.BACKWARD) + transient
        return self.held(location) + max(backward, self._sum(location, Phase.STEP))

    def format(self) -> str:
        """All terms and their peak, for a person."""
        lines = []
        for location in dict.fromkeys(term.location for term in self.terms):
            for phase in Phase:
                if terms := self._select(location, phase):
                    lines.append(f"{location}, {phase.value}:")
                lines += [_format_line(term.num_bytes, term.name, term.formula) for term in terms]
            phases = {term.phase for term in self.terms if term.location == location}
            formula = "always + max(forward and backward pass + largest transient, optimizer step)"
            if phases == {Phase.ALWAYS}:
                formula = "sum of the above"
            lines.append(_format_line(self.peak(location), f"{location}, peak", formula))
        return "\n".join(lines)

    def _select(self, location: str, phase: Phase) -> list[Term]:
        return [term for term in self.terms if (term.location, term.phase) == (location, phase)]

    def _sum(self, location: str, phase: Phase) -> int:
        return sum(term.num_bytes for term in self._select(location, phase))


def _format_line(num_bytes: int, name: str, formula: str) -> str:
    return f"  {num_bytes / GIB:9.3f} GiB  {name:<30}  {formula}"
