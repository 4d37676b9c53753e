"""The record of a run: resolved settings -> ``<run>/settings.toml``, and back.

The flags are at the top of the file, so that ``--config`` reads them back. Two tables follow that set nothing:
``[run]`` with what the run determined besides its flags, and ``[versions]`` with the packages it ran with.

Cost: none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import ConfigError
from storage.files import write_synced
from storage.urls import without_secrets
from train.settings.arguments import TrainArguments
from train.settings.flags import FIELDS, read_flag_file, read_toml

SETTINGS_FILE = "settings.toml"
OF_ONE_LAUNCH = ("dry_run", "local_rank", "debug", "verbose")
"""Flags that belong to a launch and not to the run: they are not recorded."""

_HEADER = """\
# Settings of this run, as resolved when it last started or resumed.
# Run it again:  train/main.py --config FILE
# Show a step:   python -m train.order --run FOLDER --step N
"""


class RunFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run determined besides its flags: all that its order of bins depends on, and where it came from.

    Attributes:
        checkpoint: folder that ``model_name_or_path`` resolves to.
        world_size: number of ranks.
        global_batch: bins of a step, over all ranks and micro-steps.
        num_steps: optimizer steps of the run.
        accumulation: forward passes of a rank in a step.
        per_device: bins of a rank in a forward pass; fewer in some if they have more room than the step has bins.
        shards_fingerprint: identifies the bins of the shards; None in records of older versions.
        group_runs: runs of the windows of ``group_steps``, see :class:`train.order.dealing.Grouping`; None if the
            steps are not grouped.
        command: what each rank was started with, without its launcher.
        shards_commit: git commit that each manifest of the shards is of, as ``folder@commit``, separated by commas;
            None if git has none of them.
    """

    checkpoint: str
    world_size: int
    global_batch: int
    num_steps: int
    accumulation: int
    per_device: int
    shards_fingerprint: str | None = None
    group_runs: int | None = None
    command: str | None = None
    shards_commit: str | None = None


def write_record(run_dir: Path, args: TrainArguments, facts: RunFacts, versions: Mapping[str, str]) -> None:
    """Write ``settings.toml``, or replace the one of the run's last start.

    The file is complete or absent at any moment. Only its owner may read it if a URL in it carries a signature.

    Args:
        run_dir: folder of the run.
        args: resolved settings.
        facts: what the run determined.
        versions: versions of packages by name.
    """
    flags = {name: getattr(args, name) for name in FIELDS if name not in OF_ONE_LAUNCH}
    tables = {"run": msgspec.to_builtins(facts), "versions": dict(versions)}
    text = _HEADER + format_toml(flags) + "".join(f"\n[{name}]\n{format_toml(table)}" for name, table in tables.items())
    mode = 0o666 if without_secrets(text) == text else 0o600
    write_synced(run_dir / SETTINGS_FILE, text.encode("utf-8", errors="surrogateescape"), mode=mode)


def read_record(run_dir: Path) -> tuple[TrainArguments, RunFacts]:
    """Read ``settings.toml`` of a run.

    Raises:
        ConfigError: the file is missing or incomplete.
    """
    path = run_dir / SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the folder of a run that has started, its --output_dir.")
    try:
        facts = msgspec.convert(read_toml(path).get("run"), RunFacts)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} does not record a run ([run]: {error}): start or resume the run again.") from error
    return TrainArguments(**read_flag_file(path)), facts


def format_toml(values: Mapping[str, Any]) -> str:
    """Write values as the lines of a TOML table. None is left out.

    Args:
        values: keys that need no quotes, with texts, paths, booleans, integers of 64 bits and floats.
    """
    return "".join(f"{name} = {_format_value(value)}\n" for name, value in values.items() if value is not None)


def _format_value(value: str | Path | bool | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON strings are TOML strings, except that TOML wants DEL escaped, too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
