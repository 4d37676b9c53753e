"""The exceptions of vlprep: one small family, so that the entry points can tell user errors from bugs.

Every message says what was wrong, where (file and line, dataset, id, shard, bin), what was found, what is allowed
and how to mend it. The command line prints the message alone; a traceback appears with ``--debug`` only.
"""

from __future__ import annotations

from schemas.annotation import Problem, ReasonCode

MEND_SHARDS = (
    "Copy the set of shards again, or delete its manifest.json and run the same `vlprep build` to write it anew."
)
"""How to mend a damaged set of shards. A build with a manifest is complete and would not run again."""

BUILD_AGAIN = "Remove manifest.json and run the same `vlprep build` again"
COPY_AGAIN = f"Copy it again from where it was built, or r{BUILD_AGAIN[1:]}"
"""The same as parts of a sentence: for contents that break a rule, and for bytes that changed."""


class VlprepError(Exception):
    """Root of all errors that a user can mend. ``exit_code`` is what the command line returns: 1 data, 2 wrong use."""

    exit_code = 1


class ConfigError(VlprepError):
    """Wrong use: a setting, flag, registry entry, checkpoint or missing optional package."""

    exit_code = 2


class AnnotationError(VlprepError):
    """A record that cannot become a sample. Carries every problem found, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{problem.code.value}: {problem.message}" for problem in problems))
        self.problems = problems


class MediaError(VlprepError):
    """A medium that cannot be used, with the reason code that goes to the ledger."""

    def __init__(self, code: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[MediaError], tuple[object, ...]]:
        return MediaError, (self.code, self.message)


class ShardError(VlprepError):
    """A set of shards that is incomplete, damaged or not what its manifest says."""
