r"""Reads a shell script: text -> its commands, with variables filled in. Nothing is run.

Variables that the script sets, ``${name:-default}``, arrays and arithmetic of integers are filled in. What only a shell
can know stays as it is written: command substitutions, other arithmetic, variables that the script does not set.
Variables of the script inside of the former two are filled in. A ``$`` in a word therefore is the shell's; a literal
one is written ``\$``, as in double quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from prep.migrate.arithmetic import evaluate

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*")
_PARAMETER = re.compile(r"([A-Za-z_]\w*)(?:(\[[@*]\])|:?[-=](.*))?", re.DOTALL)
_REFERENCE = re.compile(r"\$\{?[#!]?([A-Za-z_]\w*)")
_PLAIN_REFERENCE = re.compile(r"\$(\{)?(?P<name>[A-Za-z_]\w*)(?(1)\})")
_DEFAULTED = re.compile(r"\$\{([A-Za-z_]\w*:?-\w+)\}")
_BARE_NAME = re.compile(r"(?<![\w$.{])(?P<name>[A-Za-z_]\w*)")
_SIMPLE_VALUE = re.compile(r"[\w./:,-]+|\$\([^()'\"]*\)")
_HEREDOC = re.compile(r"<<-?\s*[\"'\\]?(\w+)[\"']?")
_PREFIXES = ("export", "declare", "local", "readonly", "then", "do", "else", "time", "exec", "nohup", "{")
_SEPARATORS = ";|&\n()"
_SPACE = " \t\r"
_MAX_LENGTH = 1 << 16
"""Bound on the value of a variable: each can hold the one before several times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of a script.

    Attributes:
        words: its words.
        environment: the variables that are set for it, by name.
        unresolved: its words that need a variable of the script in a way that only a shell works out.
    """

    words: tuple[str, ...]
    environment: dict[str, str]
    unresolved: tuple[str, ...] = ()


@dataclass(slots=True)
class _Word:
    """A word while it is read. ``fields`` are complete words that an unquoted expansion has split off before it."""

    text: str = ""
    is_quoted: bool = False
    fields: list[str] = field(default_factory=list)


class ShellError(ValueError):
    """The text is not a shell script; the message says why."""


def read_commands(text: str) -> list[Command]:
    """Read the commands of a script, in order.

    Raises:
        ShellError: a quote or parenthesis is not closed.
    """
    try:
        return list(_Reader(text).commands())
    except RecursionError as error:
        raise ShellError("its expansions are nested too deeply") from error


def quote(word: str) -> str:
    """Quote a word for a shell, which fills in what was left to it."""
    if "$" not in word and "`" not in word:
        return shlex.quote(word)
    if re.fullmatch(r"[\w./:=,%@${}-]+", word):
        return word
    flag, equals, value = word.partition("=")
    if equals and re.fullmatch(r"--\w+", flag):
        return f"{flag}={quote(value)}"
    return '"' + word.replace('"', '\\"') + '"'


class _Reader:
    """Position in a script, and the variables set so far."""

    def __init__(self, text: str) -> None:
        self._text = _joined_lines(text)
        self._at = 0
        self._heredocs: list[str] = []
        self._variables: dict[str, list[str]] = {}
        self._exported: dict[str, str] = {}

    def commands(self) -> Iterator[Command]:
        words: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in _SPACE:
                self._at += 1
            elif char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in _SEPARATORS:
                self._at += 1
                yield from self._finish(words)
                words = []
                if char == "\n":
                    self._skip_heredocs()
            elif char in "<>":
                self._skip_redirection()
            else:
                words += self._read_word()
        yield from self._finish(words)

    def _finish(self, words: list[str]) -> Iterator[Command]:
        """Apply the assignments in front of a command, and yield the command if there is one."""
        is_exported = False
        while words and words[0] in _PREFIXES:
            is_exported |= words[0] == "export"
            words = words[1:]
        environment: dict[str, str] = {}
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            environment[match[1]] = match[3]
            if match[2]:
                environment[match[1]] = " ".join((*self._variables.get(match[1], ()), match[3]))
            words = words[1:]
        if words and not is_exported:
            unresolved = [word for word in words if any(name in self._variables for name in _REFERENCE.findall(word))]
            yield Command(
                words=tuple(words),
                environment={**self._exported, **environment},
                unresolved=tuple(unresolved),
            )
            return
        for name, value in environment.items():
            if len(value) > _MAX_LENGTH:
                raise ShellError(f"the variable {name} is longer than {_MAX_LENGTH:,} characters")
            self._variables[name] = [value]
            if is_exported or name in self._exported:
                self._exported[name] = value
        for name in words if is_exported else ():
            if name in self._variables:
                self._exported[name] = " ".join(self._variables[name])

    def _read_word(self) -> list[str]:
        word = _Word()
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in _SPACE or (char in _SEPARATORS and not self._starts_array(word)) or char in "<>":
                if char in "<>" and word.text.isdigit() and not word.is_quoted:
                    return word.fields  # the file descriptor of a redirection
                break
            self._at += 1
            if char == "~" and self._starts_home(word):
                word.text += "$HOME"
            elif char == "'":
                word.text += self._until("'").replace("\\", "\\\\").replace("$", "\\$")
                word.is_quoted = True
            elif char == '"':
                self._read_double_quoted(word)
            elif char == "\\" and self._at < len(self._text):
                word.text += {"$": "\\$"}.get(self._text[self._at], self._text[self._at])
                self._at += 1
            elif char == "(":
                self._read_array(word)
                return []
            elif char in "$`":
                is_assigned = _ASSIGNMENT.fullmatch(word.text) is not None
                self._add(word, self._expand(char), is_split=not is_assigned)
            else:
                word.text += char
        return [*word.fields, word.text] if word.text or word.is_quoted else word.fields

    def _starts_array(self, word: _Word) -> bool:
        return self._text[self._at] == "(" and bool(re.fullmatch(r"[A-Za-z_]\w*\+?=", word.text))

    def _starts_home(self, word: _Word) -> bool:
        """Whether the tilde before the position is the home folder: at the start of a word or of a value."""
        is_start = re.fullmatch(r"([A-Za-z_]\w*\+?=)?", word.text) is not None and not word.is_quoted
        return is_start and self._text[self._at : self._at + 1] in ("/", "", *_SPACE, *_SEPARATORS)

    def _read_array(self, word: _Word) -> None:
        """Read the words of ``name=( … )`` into the variable."""
        items: list[str] = []
        while self._at < len(self._text) and self._text[self._at] != ")":
            char = self._text[self._at]
            if char == "#":
                self._until("\n")
            elif char in _SPACE + "\n":
                self._at += 1
            elif char in _SEPARATORS + "<>":
                raise ShellError("an array is not closed")
            else:
                items += self._read_word()
        if self._at >= len(self._text):
            raise ShellError("an array is not closed")
        self._at += 1
        name = word.text.rstrip("+=")
        before = self._variables.get(name, []) if word.text.endswith("+=") else []
        items = [*before, *items]
        if sum(map(len, items)) > _MAX_LENGTH:
            raise ShellError(f"the variable {name} is longer than {_MAX_LENGTH:,} characters")
        self._variables[name] = items

    def _read_double_quoted(self, word: _Word) -> None:
        word.is_quoted = True
        while self._at < len(self._text):
            char = self._text[self._at]
            self._at += 1
            if char == '"':
                return
            if char == "\\" and self._text[self._at : self._at + 1] in ("$", "`", '"', "\\"):
                word.text += {"$": "\\$"}.get(self._text[self._at], self._text[self._at])
                self._at += 1
            elif char in "$`":
                values = self._expand(char)
                if len(values) > 1:
                    word.fields += [word.text + values[0], *values[1:-1]]
                    word.text = values[-1]
                else:
                    word.text += "".join(values)
            else:
                word.text += char
        raise ShellError("a double quote is not closed")

    def _add(self, word: _Word, values: list[str], *, is_split: bool) -> None:
        """Add an unquoted expansion, which splits at white space."""
        for index, value in enumerate(values):
            if index:
                word.fields.append(word.text)
                word.text = ""
            if not is_split:
                word.text += value
                continue
            parts = _split_fields(value)
            if parts and value[:1].isspace() and word.text:
                word.fields.append(word.text)
                word.text = ""
            for part in parts[:-1]:
                word.fields.append(word.text + part)
                word.text = ""
            word.text += parts[-1] if parts else ""

    def _expand(self, char: str) -> list[str]:
        """Expand what follows a ``$`` or a backquote: the value of a variable, or the text as it is written."""
        if char == "`":
            return [self._filled(f"`{self._until('`')}`")]
        if self._text.startswith("(", self._at):
            return [self._filled("$" + self._balanced("(", ")"))]
        if self._text.startswith("{", self._at):
            return self._expand_parameter(self._balanced("{", "}")[1:-1])
        match = _NAME.match(self._text, self._at)
        if match is None:
            special = self._text[self._at : self._at + 1]
            self._at += len(special)
            return ["$" + special]
        self._at = match.end()
        return self._variables.get(match[0], [f"${match[0]}"])

    def _filled(self, text: str) -> str:
        """Fill the variables of the script with a simple value into a command substitution or arithmetic."""

        def fill(match: re.Match[str]) -> str:
            value = " ".join(self._variables.get(match["name"], ()))
            return value if _SIMPLE_VALUE.fullmatch(value) else match[0]

        def expand(match: re.Match[str]) -> str:
            value = " ".join(self._expand_parameter(match[1]))
            return value if _SIMPLE_VALUE.fullmatch(value) else match[0]

        if not text.startswith("$(("):
            return _PLAIN_REFERENCE.sub(fill, text)
        if "$(" not in text[3:]:
            text = _BARE_NAME.sub(fill, _DEFAULTED.sub(expand, text))
        text = _PLAIN_REFERENCE.sub(fill, text)
        return (evaluate(text[3:-2]) if text.endswith("))") else None) or text

    def _expand_parameter(self, inner: str) -> list[str]:
        match = _PARAMETER.fullmatch(inner)
        if match is None:
            return [f"${{{inner}}}"]
        name, _, default = match.groups()
        if name in self._variables:
            return self._variables[name]
        if default is None:
            return [f"${{{inner}}}"]
        nested = _Reader(default)
        nested._variables = self._variables
        word = _Word()
        while nested._at < len(default):
            if default[nested._at] in _SPACE + _SEPARATORS + "<>":
                word.text += default[nested._at]
                nested._at += 1
            else:
                word.text += " ".join(nested._read_word())
        return [word.text]

    def _balanced(self, opening: str, closing: str) -> str:
        """Read from an opening bracket to the one that closes it."""
        depth, start = 0, self._at
        while self._at < len(self._text):
            char = self._text[self._at]
            depth += (char == opening) - (char == closing)
            self._at += 1
            if depth == 0:
                return self._text[start : self._at]
        raise ShellError(f"{opening!r} is not closed")

    def _until(self, closing: str) -> str:
        end = self._text.find(closing, self._at)
        if end < 0:
            if closing == "\n":
                end = len(self._text)
            else:
                raise ShellError(f"{closing} is not closed")
        text, self._at = self._text[self._at : end], end + 1
        return text

    def _skip_heredocs(self) -> None:
        """Skip the texts of the here-documents that the last line announced."""
        for delimiter in self._heredocs:
            match = re.compile(rf"^\t*{re.escape(delimiter)}$", re.MULTILINE).search(self._text, self._at)
            if match is None:
                raise ShellError(f"the here-document {delimiter} is not closed")
            self._at = match.end()
        self._heredocs = []

    def _skip_redirection(self) -> None:
        match = _HEREDOC.match(self._text, self._at)
        if match is not None:
            self._heredocs.append(match[1])
            self._at = match.end()
            return
        while self._at < len(self._text) and self._text[self._at] in "<>&":
            self._at += 1
        while self._at < len(self._text) and self._text[self._at] in _SPACE:
            self._at += 1
        if self._at < len(self._text) and self._text[self._at] not in _SEPARATORS:
            self._read_word()


def _joined_lines(text: str) -> str:
    """Join lines that end in a backslash with the next one. Comments have no next line, and break no other."""
    joined = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.lstrip().startswith("#"):
            continue
        is_continued = (len(line) - len(line.rstrip("\\"))) % 2 == 1
        joined.append(line[:-1] if is_continued else line + "\n")
    return "".join(joined)


def _split_fields(text: str) -> list[str]:
    """Split at white space outside of the parentheses of ``$( … )`` and outside of backquotes."""
    fields, depth, is_in_field, is_backquoted = [""], 0, False, False
    for char in text:
        is_backquoted ^= char == "`"
        depth += (char == "(") - (char == ")")
        if char.isspace() and depth <= 0 and not is_backquoted:
            if is_in_field:
                fields.append("")
            is_in_field = False
        else:
            fields[-1] += char
            is_in_field = True
    return [item for item in fields if item]
