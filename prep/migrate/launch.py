"""Finds the training in a script: a shell script, a command line or a YAML of LLaMA-Factory -> :class:`Launch`."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import NamedTuple

from prep.migrate.shell import Command, ShellError, read_commands
from prep.migrate.tools import LLAMA_FACTORY, SWIFT, UPSTREAM, Tool
from schemas.errors import ConfigError, VlprepError

YAML_SUFFIXES = (".yaml", ".yml", ".json")
_LAUNCHERS = ("torchrun", "deepspeed", "python", "python3", "accelerate")
_LAUNCHER_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
}
_COMMANDS = ("swift", "llamafactory-cli", "lmf")
_COMMAND_MODULES = ("swift.cli.main", "llamafactory.cli")
"""Modules that do what a command does: they start the ranks themselves."""
_SUBCOMMANDS = ("sft", "pt", "train")
_UNREAD = {
    "source": "it may set variables, and is not read",
    ".": "it may set variables, and is not read",
    "for": "the commands stand here once, and its variable is left to the shell",
    "while": "the commands stand here once",
}
"""Commands of a shell that change what a script does, and why they are listed."""

_RENDEZVOUS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")

FLAGS_IN_ENVIRONMENT = {
    "FPS": "fps",
    "FPS_MAX_FRAMES": "fps_max_frames",
    "FPS_MIN_FRAMES": "fps_min_frames",
    "MAX_PIXELS": "max_pixels",
    "MIN_PIXELS": "min_pixels",
    "VIDEO_MAX_PIXELS": "video_max_pixels",
    "VIDEO_MIN_PIXELS": "video_min_pixels",
    "VIDEO_TOTAL_PIXELS": "video_total_pixels",
}
"""Variables that ms-swift reads media settings from."""

_KEPT_VARIABLES = re.compile(
    r"CUDA_|NCCL_|PYTORCH_|TORCH_|HF_|WANDB_|OMP_|GLOO_|ASCEND_|TOKENIZERS_|MASTER_|NNODES$|NODE_RANK$|NPROC_PER_NODE$"
)
_LAUNCH_VARIABLES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN")


class ScriptError(VlprepError):
    """A file that is not what it should be: no script, no YAML of settings, no registry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A flag as a script has it: how it is written, its name with underscores, and the words of its value."""

    written: str
    name: str
    values: tuple[str, ...]

    @property
    def value(self) -> str:
        """The value in one word."""
        return " ".join(self.values)

    def text(self) -> str:
        """The flag with its value."""
        return f"{self.written} {self.value}".strip()


@dataclass(kw_only=True, slots=True)
class Launch:
    """A training that a script starts.

    Attributes:
        tool: the trainer.
        launcher: the words in front of the program that start its ranks.
        environment: variables to set in front of the command.
        flags: of the trainer, in order.
        not_understood: what else is in the script and could not be read, a sentence each.
    """

    tool: Tool
    launcher: list[str] = field(default_factory=lambda: ["deepspeed"])
    environment: dict[str, str] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)


def read_script(path: Path) -> Launch:
    """Read a script.

    Raises:
        ScriptError: the file is no script, or starts no training.
        ConfigError: there is no such file, or the package that reads YAML is not installed.
    """
    try:
        text = read_file(path)
    except UnicodeDecodeError as error:
        raise ScriptError(f"{path} cannot be read as a script: {error}.") from error
    if path.suffix in YAML_SUFFIXES:
        launch = Launch(tool=LLAMA_FACTORY)
        _read_yaml(text, str(path), launch)
        return launch
    try:
        commands = read_commands(text)
    except ShellError as error:
        raise ScriptError(f"{path} is not a shell script: {error}.") from error
    training = _find_launch(commands, path.parent)
    if training is None:
        raise ScriptError(
            f"{path} starts no training that is known here: no torchrun, deepspeed or python with a .py file or -m, no "
            "swift sft, no llamafactory-cli train. Give its flags after --."
        )
    return training


def read_file(path: Path) -> str:
    """Read a file that the command line names.

    Raises:
        ConfigError: it does not exist, or cannot be read.
        UnicodeDecodeError: it holds no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fault = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ConfigError(
            f"{path} {fault}. Give a launch script, a YAML of settings or a registry of datasets, or a command line "
            "after --."
        ) from error


def read_words(words: Sequence[str]) -> Launch:
    """Read a command line, or flags alone, which are those of the upstream framework.

    Raises:
        ScriptError: it starts no training.
    """
    if words[0].startswith("--"):
        launch = Launch(tool=UPSTREAM)
        _read_flags(words, launch)
        return launch
    training = _find_launch([Command(words=tuple(words), environment={})], Path())
    if training is None:
        raise ScriptError(f"{words[0]!r} is neither an existing script nor a command that trains. Give one of them.")
    return training


def _find_launch(commands: Sequence[Command], folder: Path) -> Launch | None:
    """Read the first command that trains. One without any known flag is another program, if there is a choice."""
    launches = [
        (command, _launch_of(command, parts, folder))
        for command in _without_shells(commands)
        if (parts := _split_command(command.words)) is not None
    ]
    known = [item for item in launches if any(flag.name in item[1].tool.rules for flag in item[1].flags)]
    # python -m runs anything, such as pip.
    trainings = known or [item for item in launches if item[1].tool is not UPSTREAM or "-m" not in item[0].words]
    if not trainings:
        return None
    (_, launch), *others = trainings
    launch.not_understood += [f"a second training: {' '.join(command.words[:6])} …" for command, _ in others]
    launch.not_understood += [
        f"{' '.join(command.words)}: {_UNREAD[command.words[0]]}" for command in commands if command.words[0] in _UNREAD
    ]
    return launch


def _without_shells(commands: Sequence[Command]) -> Iterator[Command]:
    """Replace ``bash -c '…'`` by the commands in it.

    Raises:
        ScriptError: they cannot be read.
    """
    for command in commands:
        words = command.words
        shells = [at for at, word in enumerate(words[:-2]) if PurePath(word).name in ("bash", "sh")]
        if not shells or not re.fullmatch(r"-\w*c", words[shells[0] + 1]):
            yield command
            continue
        text = words[shells[0] + 2].replace("\\$", "$")
        try:
            inner_commands = read_commands(text)
        except ShellError as error:
            raise ScriptError(f"{' '.join(words[: shells[0] + 2])}: what it runs is not a script: {error}.") from error
        for inner in inner_commands:
            environment = {**command.environment, **inner.environment}
            yield replace(inner, words=(*words[: shells[0]], *inner.words), environment=environment)


class _Parts(NamedTuple):
    """The words of a command that trains. ``launcher`` starts the ranks of ``program``, a file, module or command."""

    in_front: Sequence[str]
    launcher: Sequence[str]
    program: str
    arguments: Sequence[str]


def _split_command(words: Sequence[str]) -> _Parts | None:
    """Split a command; None if it starts no training."""
    starts = [at for at, word in enumerate(words) if PurePath(word).name in _LAUNCHERS]
    for at, word in enumerate(words):
        start = min([at, *starts])
        has_subcommand = at + 1 < len(words) and words[at + 1] in _SUBCOMMANDS
        is_command = has_subcommand and PurePath(word).name in _COMMANDS
        is_module = at > start and words[at - 1] in ("-m", "--module") and word not in _LAUNCHER_MODULES
        if not is_command and not is_module and not (at > start and word.endswith(".py")):
            continue
        launcher = words[start : at - is_module]
        if word in _COMMAND_MODULES and PurePath(launcher[0]).name.startswith("python"):
            launcher = ()
        is_in_two_words = has_subcommand and not word.endswith(".py")
        return _Parts(words[:start], launcher, word, words[at + 1 + is_in_two_words :])
    return None


def _tool_of(parts: _Parts) -> Tool:
    name = re.sub(r"[-_]", "", parts.program.lower())
    if "swift" in name:
        return SWIFT
    is_factory = "llamafactory" in name or name.endswith("lmf") or "--stage" in parts.arguments
    return LLAMA_FACTORY if is_factory or [*parts.arguments, ""][0].endswith(YAML_SUFFIXES) else UPSTREAM


def _launch_of(command: Command, parts: _Parts, folder: Path) -> Launch:
    launch = Launch(tool=_tool_of(parts))
    _read_environment(command.environment, launch)
    launch.not_understood += [
        f"the word {word}: it needs a variable of the script in a way that only a shell works out"
        for word in command.unresolved
    ]
    if parts.in_front:
        launch.not_understood.append(f"{' '.join(parts.in_front)}: put it in front of the commands if they need it")
    launch.launcher = _launcher_of(parts.launcher, command.environment, launch)
    flags = list(parts.arguments)
    if launch.tool is LLAMA_FACTORY and flags and flags[0].endswith(YAML_SUFFIXES):
        _read_yaml_file(flags.pop(0), folder, launch)
        flags = [f"--{word}" if re.match(r"\w+=", word) else word for word in flags]
    _read_flags(flags, launch)
    return launch


def _read_environment(environment: dict[str, str], launch: Launch) -> None:
    for name, value in environment.items():
        if launch.tool is SWIFT and name in FLAGS_IN_ENVIRONMENT:
            launch.flags.append(Flag(written=name, name=FLAGS_IN_ENVIRONMENT[name], values=(value,)))
        elif name in _LAUNCH_VARIABLES:
            continue
        elif _KEPT_VARIABLES.match(name):
            launch.environment[name] = value
        elif launch.tool is SWIFT or name.isupper():
            launch.not_understood.append(f"the variable {name}={value}")


def _launcher_of(words: Sequence[str], environment: dict[str, str], launch: Launch) -> list[str]:
    """The words that start the ranks here."""
    name = PurePath(words[0]).name if words else ""
    options = list(words[1:])
    if name.startswith("python") and options[:1] == ["-m"]:
        name, options = _LAUNCHER_MODULES[options[1]], options[2:]
    if name == "accelerate":
        return _launcher_of_accelerate(options, launch)
    if name:
        return ["python" if name.startswith("python") else name, *options]
    variables = {variable.lower(): environment[variable] for variable in _LAUNCH_VARIABLES if variable in environment}
    options = [f"--{option}={variables[option]}" for option in _RENDEZVOUS if option in variables]
    if launch.tool is SWIFT and "nproc_per_node" not in variables:
        options.append("--nproc_per_node=1")  # it starts one process unless told otherwise
    return ["torchrun", *options] if options else ["deepspeed"]


def _launcher_of_accelerate(options: Sequence[str], launch: Launch) -> list[str]:
    words = ["torchrun"]
    renamed = {
        "num_processes": "nproc_per_node",
        "num_machines": "nnodes",
        "machine_rank": "node_rank",
        "main_process_port": "master_port",
    }
    flags = split_flags([word for word in options if word != "launch"], [])
    machines = next((flag.value for flag in flags if flag.name == "num_machines"), "1")
    for flag in flags:
        name, value = renamed.get(flag.name, flag.name), flag.value
        if flag.name == "num_processes" and machines != "1":  # it counts those of all machines
            is_known = value.isdigit() and machines.isdigit() and int(machines) > 0
            value = str(int(value) // int(machines)) if is_known else f"$(({value}/{machines}))"
        if name in _RENDEZVOUS:
            words.append(f"--{name}={value}")
        else:
            launch.not_understood.append(f"the option {flag.text()} of accelerate")
    return words


def _read_flags(words: Sequence[str], launch: Launch) -> None:
    strays: list[str] = []
    launch.flags += split_flags(words, strays)
    launch.not_understood += [f"the word {word}" for word in strays]


def split_flags(words: Sequence[str], strays: list[str]) -> list[Flag]:
    """Split words into flags with their values. Words in front of the first flag go to ``strays``."""
    flags: list[Flag] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            written, equals, value = word.partition("=")
            name = written[2:].replace("-", "_")
            flags.append(Flag(written=written, name=name, values=(value,) if equals else ()))
        elif flags:
            last = flags[-1]
            flags[-1] = Flag(written=last.written, name=last.name, values=(*last.values, word))
        else:
            strays.append(word)
    return flags


def _read_yaml_file(name: str, folder: Path, launch: Launch) -> None:
    """Read the YAML that a script names, relative to the working folder or to a folder above the script."""
    candidates = [Path(name), *(above / name for above in (folder, *folder.absolute().parents[:3]))]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        launch.not_understood.append(f"the file {name}, which does not exist here")
        return
    _read_yaml(path.read_text(encoding="utf-8"), str(path), launch)


def _read_yaml(text: str, path: str, launch: Launch) -> None:
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError(f"{path} needs the pyyaml package: pip install pyyaml")
    import yaml

    try:
        values, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number out of bounds
        raise ScriptError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ScriptError(f"{path} holds no settings: lines such as `learning_rate: 1.0e-4` are expected.")
    for key, count in Counter(node.value for node, _ in root.value).items():
        if count > 1:
            launch.not_understood.append(f"{key} in {path}, which is there {count} times: the last one was read")
    for key, value in values.items():
        if value is None:  # a known flag has its default
            if str(key) not in launch.tool.rules:
                launch.flags.append(Flag(written=f"{key}:", name=str(key), values=("null",)))
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) for item in items):
            launch.not_understood.append(f"{key} in {path}, a table or a nested list")
            continue
        launch.flags.append(Flag(written=f"{key}:", name=str(key), values=(",".join(map(str, items)),)))
