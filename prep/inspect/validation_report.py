"""What ``vlprep validate`` says: counts by file, reason code and modality, and the first examples of each code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from prep.annotations.undeclared import UndeclaredCounts
from prep.annotations.unused import describe_unused
from schemas.annotation import Problem
from schemas.wording import counted, kinds_text

_EXAMPLES_PER_CODE = 3


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A rejected record as ``--rejects`` writes it: its origin, all problems, and the record (null if not JSON)."""

    file: str
    line: int
    record: int
    id: str | None
    problems: list[Problem]
    annotation: msgspec.Raw


@dataclass(kw_only=True, slots=True)
class FileCounts:
    """Counts of one annotation file.

    Attributes:
        num_valid: valid records.
        num_rejected: rejected records.
        num_media: media that its records name.
        num_media_found: those that are not missing.
        missing: name of a missing medium; None if none is missing.
    """

    num_valid: int = 0
    num_rejected: int = 0
    num_media: int = 0
    num_media_found: int = 0
    missing: str | None = None

    def add(self, other: FileCounts) -> None:
        """Add the counts of other records of the file."""
        self.num_valid += other.num_valid
        self.num_rejected += other.num_rejected
        self.num_media += other.num_media
        self.num_media_found += other.num_media_found
        self.missing = self.missing or other.missing


@dataclass(kw_only=True, slots=True)
class Report:
    """Counts over all records, with the first examples of each reason code.

    Attributes:
        files: counts by annotation file.
        codes: number of rejected records by reason code.
        modalities: number of valid records by kind of their media.
        num_problems: number of problems by reason code. A record may have several.
        unused: number of records by the names of their fields that have no effect.
        examples: the first problems by reason code, as text.
        rejects: file with all rejects; None if it is not written.
        undeclared: records with boxes whose coordinates nobody declared.
        hints: sentences about causes that many records share.
    """

    files: dict[str, FileCounts] = field(default_factory=dict)
    codes: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    num_problems: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rejects: Path | None = None
    undeclared: UndeclaredCounts = field(default_factory=UndeclaredCounts)
    hints: list[str] = field(default_factory=list)

    def add(self, file: str, counts: FileCounts, modalities: Mapping[str, int], rejects: Sequence[Reject]) -> None:
        """Add the counts and rejects of some records of a file."""
        self.files[file].add(counts)
        self.modalities.update(modalities)
        for reject in rejects:
            self.codes.update({problem.code.value for problem in reject.problems})
            for problem in reject.problems:
                self.num_problems[problem.code.value] += 1
                examples = self.examples.setdefault(problem.code.value, [])
                if len(examples) < _EXAMPLES_PER_CODE:
                    name = f" (id {reject.id})" if reject.id is not None else ""
                    examples.append(f"{reject.file}:{reject.line}{name}: {problem.message}")

    @property
    def num_valid(self) -> int:
        """Valid records of all files."""
        return sum(counts.num_valid for counts in self.files.values())

    @property
    def num_rejected(self) -> int:
        """Rejected records of all files."""
        return sum(counts.num_rejected for counts in self.files.values())

    @property
    def empty_files(self) -> list[str]:
        """Files without any record."""
        return [file for file, counts in self.files.items() if not counts.num_valid + counts.num_rejected]

    @property
    def exit_code(self) -> int:
        """2 if coordinates of boxes are not declared, 1 if a record is rejected or a file is empty, else 0."""
        if self.undeclared:
            return 2
        return 1 if self.num_rejected or self.empty_files else 0

    def text(self) -> str:
        """The report as text."""
        total = self.num_valid + self.num_rejected
        kinds = kinds_text(dict(self.modalities.most_common()))
        lines = [
            f"{counted(total, 'annotation')}: {self.num_valid:,} valid, {self.num_rejected:,} rejected",
            f"valid: {kinds or 'none'}",
        ]
        for code, count in self.codes.most_common():
            lines.append(f"{code}: {count:,}")
            lines.extend(f"  {example}" for example in self.examples[code])
            num_more = self.num_problems[code] - len(self.examples[code])
            if num_more:
                lines.append(f"  … {num_more:,} more; {self._where_all()}")
        if self.unused:
            lines.append(f"fields not used: {describe_unused(self.unused)}")
        lines.extend(f"{file}: the file holds no annotation. Check the path." for file in self.empty_files)
        if self.undeclared:
            lines.append(self.undeclared.message())
        return "\n".join([*lines, *self.hints])

    def json(self) -> str:
        """The report as one JSON object."""
        content = {
            "num_annotations": self.num_valid + self.num_rejected,
            "num_valid": self.num_valid,
            "num_rejected": self.num_rejected,
            "modalities": dict(sorted(self.modalities.items())),
            "rejects_by_code": dict(sorted(self.codes.items())),
            "files": {
                file: {"num_valid": counts.num_valid, "num_rejected": counts.num_rejected}
                for file, counts in self.files.items()
            },
            "unused_fields": dict(sorted(self.unused.items())),
            "examples": dict(sorted(self.examples.items())),
            "undeclared_boxes": self.undeclared.num_records,
            "hints": self.hints,
        }
        return msgspec.json.encode(content).decode()

    def _where_all(self) -> str:
        return "--rejects FILE writes all" if self.rejects is None else f"all are in {self.rejects}"
