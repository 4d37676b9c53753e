"""The exceptions of vlprep: one small family, so that entry points can tell user errors from bugs.

Every message says what is wrong, where (file and line, dataset, id, shard, bin), the value, the allowed values and the
fix. The command line prints only the message; ``--debug`` adds a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

from schemas.annotation import ReasonCode

MEND_SHARDS = (
    "Copy the set of shards again, or delete its manifest.json and run the same `vlprep build` to write it again."
)
"""How to repair a damaged set of shards. A build with a manifest is complete and would not run again."""

BUILD_AGAIN = "Remove manifest.json and run the same `vlprep build` again"
COPY_AGAIN = f"Copy it again from where it was built, or r{BUILD_AGAIN[1:]}"
"""The same advice as clauses: the first for contents that break a rule, the second for bytes that changed."""

GIVE_SHARDS = "Give the folder or URL that `vlprep build --out` wrote."


class VlprepError(Exception):
    """Root of all errors that a user can fix. ``exit_code`` is that of the command line: 1 for data, 2 for usage."""

    exit_code = 1


class ConfigError(VlprepError):
    """Wrong usage: a setting, flag, registry entry, checkpoint or missing optional package."""

    exit_code = 2


class ConfigErrors(ConfigError):
    """Everything that is wrong with a set of settings: one sentence, or a list with a line for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{count} problems:" if count > 1 else ""
        super().__init__("\n  - ".join((heading, *self.problems)) if heading else "".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[object, ...]]:
        return ConfigErrors, (self.problems,)


class MediaError(VlprepError):
    """A medium that cannot be used, with its reason code for the ledger."""

    def __init__(self, code: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[MediaError], tuple[object, ...]]:
        return MediaError, (self.code, self.message)


class ShardError(VlprepError):
    """A set of shards that is incomplete or damaged, or contradicts its manifest."""
