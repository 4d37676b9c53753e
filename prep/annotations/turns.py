"""Adds the turns of a record to one canonical conversation, whatever its dialect.

In: messages, texts with a role, tools. Out: turns with the roles ``system``, ``human``, ``gpt`` (or one ``text``),
where each is in the record, and which answers have no loss. Tool calls join the model's turn and tool results
become the user's turn, as in the Qwen2.5 chat template.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from prep.annotations.fields import UNSUPPORTED_PART_FIELDS, UNSUPPORTED_TURN_FIELDS, says_something
from prep.annotations.media_fields import MediaReader
from prep.annotations.reading import FieldReader, type_name
from prep.annotations.tools import ToolError, answer_with_calls, calls_in_text, result_text, system_with_tools
from schemas.annotation import ReasonCode, Turn

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "function_call": "call",
    "tool_call": "call",
    "observation": "result",
    "tool": "result",
    "tool_response": "result",
    "function": "result",
}
"""Kind of turn by accepted role, in lower case. Records may use any case."""

_LOSS_FLAGS = ("loss", "train", "weight")
_FURTHER_FIELDS = (*_LOSS_FLAGS, "tool_calls", "function_call")
TURN_FIELDS = frozenset({"from", "value", "role", "content", *_FURTHER_FIELDS})
"""Fields of a turn in either spelling."""

_INDEX = re.compile(r"\[\d+\]")
_TEXT_TYPES = ("text", "input_text", "output_text")


class TurnReader:
    """The conversation of one record while it is read.

    Attributes:
        turns: in canonical form.
        text_paths: JSON path of each turn's text.
        role_paths: JSON path of each turn's role; that of its text in dialects whose field names imply the role.
        untrained: indices of ``gpt`` turns without loss.
        is_readable: whether all turns so far could be read.
        fields: collects problems and unused fields.
    """

    def __init__(self, fields: FieldReader, media: MediaReader) -> None:
        self.turns: list[Turn] = []
        self.text_paths: list[str] = []
        self.role_paths: list[str] = []
        self.untrained: set[int] = set()
        self.is_readable = True
        self.fields = fields
        self._media = media
        self._last_kind = ""

    def fail(self, message: str, code: ReasonCode = ReasonCode.BAD_FIELD) -> None:
        """Add a problem that leaves the conversation unreadable."""
        self.is_readable = False
        self.fields.fail(message, code)

    def add_field(self, kind: str, fields: dict[str, Any], key: str, where: str = "$") -> None:
        """Add a turn whose text is a field."""
        self.add(kind, self.text(fields, key, where), f"{where}.{key}")

    def text(self, fields: dict[str, Any], key: str, where: str) -> str:
        """A field of a turn that must be a string."""
        self.is_readable &= isinstance(fields.get(key), str)
        return self.fields.text(fields, key, where)

    def add_messages(self, messages: object, where: str) -> None:
        """Add turns given as a list of ``{role, content}`` or ``{from, value}``."""
        if not isinstance(messages, list):
            self.fail(f"{where} is of type {type_name(messages)}; expected an array of turns")
            return
        if not messages:
            self.fail(f"{where} is empty; give at least a question and an answer", ReasonCode.MISSING_CONVERSATIONS)
        for index, message in enumerate(messages):
            path = f"{where}[{index}]"
            if isinstance(message, dict):
                self._add_message(message, path, f"{where.removeprefix('$.')}[]")
            else:
                self.fail(f"{path} is of type {type_name(message)}; expected an object")

    def add(self, kind: str, text: str, path: str, *, role_path: str | None = None, is_trained: bool = True) -> None:
        """Add a turn. A call joins the model's turn, and a result joins the result before it.

        Args:
            kind: a value of :data:`ROLES`, or a role that is not known.
            text: what the turn says.
            path: JSON path of the text.
            role_path: JSON path of the role; None if no field holds it.
            is_trained: whether the turn has a loss.
        """
        is_model = kind in ("gpt", "call")
        joins = bool(self.turns) and (
            (kind == "call" and self._last_kind in ("gpt", "call")) or (kind == "result" == self._last_kind)
        )
        if kind == "call":
            text = self._calls_text("", [text], path)
        elif kind == "result":
            text = result_text(text)
            if not joins and self._last_kind not in ("gpt", "call"):
                self.fail(
                    f"{path} is the result of a tool, but the turn before it is not one of the model's",
                    ReasonCode.BAD_TURN_ORDER,
                )
        if joins:
            if is_model and is_trained == (len(self.turns) - 1 in self.untrained):
                self.fail(
                    f"{path} and the turn before it are one turn of the model, but only one of them has a loss",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            last = self.turns[-1]
            self.turns[-1] = Turn(last.role, f"{last.value}\n{text}" if last.value else text)
        else:
            if is_model and not is_trained:
                self.untrained.add(len(self.turns))
            self.turns.append(Turn({"call": "gpt", "result": "human"}.get(kind, kind), text))
            self.text_paths.append(path)
            self.role_paths.append(role_path or path)
        self._last_kind = kind

    def add_system(self, system: object, tools: object) -> None:
        """Put the record's own system text and tools into the first turn."""
        has_turn = bool(self.turns) and self.turns[0].role == "system"
        if says_something(system):
            if not isinstance(system, str):
                self.fail(f"$.system is of type {type_name(system)}; expected a string")
                return
            if has_turn and self.turns[0].value != system:
                self.fail("$.system differs from the system turn; give one of them")
                return
        elif has_turn:
            system = self.turns[0].value
        text = system if isinstance(system, str) else ""
        try:
            text = system_with_tools(text, tools) if says_something(tools) else text
        except ToolError as error:
            self.fail(f"$.tools: {error}")
        if not text:
            return
        if has_turn:
            self.turns[0] = Turn("system", text)
        elif self.turns and self.turns[0].role == "text":
            self.fail("$.text is for continued pretraining, which has no system message; remove $.system and $.tools")
        else:
            self.turns.insert(0, Turn("system", text))
            self.text_paths.insert(0, "$.system")
            self.role_paths.insert(0, "$.system")
            self.untrained = {index + 1 for index in self.untrained}

    def _add_message(self, message: dict[str, Any], path: str, name: str) -> None:
        role_key, value_key = ("role", "content") if "role" in message or "content" in message else ("from", "value")
        role = self.text(message, role_key, path)
        kind = ROLES.get(role.lower(), role)
        calls = self._calls(message, kind, path)
        has_content = not calls or message.get(value_key) is not None
        content = self._content(message, value_key, path) if has_content else ""
        if calls:
            content = self._calls_text(content, calls, f"{path}.tool_calls")
        is_trained = self._is_trained(message, kind, path)
        self.add(kind, content, f"{path}.{value_key}", role_path=f"{path}.{role_key}", is_trained=is_trained)
        used = {role_key, value_key, *_FURTHER_FIELDS}
        self.fields.account(message, used, name, where=path, refused=UNSUPPORTED_TURN_FIELDS)

    def _calls(self, message: dict[str, Any], kind: str, path: str) -> list[Any]:
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            self.fail(f"{path}.tool_calls is of type {type_name(calls)}; expected an array")
            return []
        if says_something(message.get("function_call")):
            calls = [*calls, message["function_call"]]
        if calls and kind != "gpt":
            self.fail(f"{path} has tool calls, but its role is {kind[:40]!r}; only the model calls tools")
        return calls

    def _calls_text(self, content: str, calls: list[Any], path: str) -> str:
        try:
            parsed = [call for item in calls for call in (calls_in_text(item) if isinstance(item, str) else [item])]
            text = answer_with_calls(content, parsed)
        except ToolError as error:
            self.fail(f"{path}: {error}")
            return content
        for call in parsed:
            self._account_call(call, path)
        return text

    def _account_call(self, call: dict[str, Any], path: str) -> None:
        """Account for the fields of a call that could be laid out."""
        name = f"{_INDEX.sub('[]', path.removeprefix('$.'))}[]"
        kind = call.get("type")
        if says_something(kind) and kind not in ("function", "function_call"):
            self.fields.fail(
                f"{path} has a call of type {kind!r:.40}; only calls of functions are supported",
                ReasonCode.UNSUPPORTED_FIELD,
            )
        if isinstance(call.get("function"), dict):
            self.fields.account(call, {"type", "function"}, name, where=path)
            self.fields.account(call["function"], {"name", "arguments"}, f"{name}.function", where=path)
        else:
            self.fields.account(call, {"type", "name", "arguments"}, name, where=path)

    def _is_trained(self, message: dict[str, Any], kind: str, path: str) -> bool:
        """Whether a turn has a loss: ``loss`` (ms-swift), ``train`` (Axolotl) or ``weight`` (OpenAI) may say no."""
        trained = True
        for name in _LOSS_FLAGS:
            value = message.get(name)
            if value is None:
                continue
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                self.fields.fail(
                    f"{path}.{name} is {value!r:.40}; allowed: true, false, 1, 0. Other weights of the loss are "
                    "not supported",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            elif value and kind not in ("gpt", "call"):
                self.fields.fail(
                    f"{path}.{name} asks for a loss on a {kind[:40]} turn, which is not supported; only the "
                    "model's turns are trained",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            else:
                trained = trained and bool(value)
        return trained

    def _content(self, message: dict[str, Any], key: str, path: str) -> str:
        """The text of a turn. Of a list of parts, media become tags."""
        content = message.get(key)
        if not isinstance(content, list):
            return self.text(message, key, path)
        return "".join(self._part(part, f"{path}.{key}[{index}]") for index, part in enumerate(content))

    def _part(self, part: object, where: str) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            self.fail(f"{where} is of type {type_name(part)}; expected a part of type text, image or video")
            return ""
        kind = MediaReader.kind_of(part)
        if kind is not None:
            if says_something(part.get("text")):
                self.fail(f"{where} has a medium and text; give the text a part of its own")
            used = self._media.add_part(kind, part, where)
            self._account_part(part, {*used, "text"}, where)
            return f"<{kind}>"
        if part.get("type", "text") in _TEXT_TYPES and "text" in part:
            if MediaReader.names_medium(part):
                self.fail(f"{where} is text and names a medium; give the medium a part of its own")
            self._account_part(part, {"type", "text", *MediaReader.KEYS}, where)
            return self.text(part, "text", where)
        self._account_part(part, part.keys(), where)
        if not any(says_something(part.get(name)) for name in UNSUPPORTED_PART_FIELDS):
            self.fail(f"{where} is not a part of type text, image or video")
        return ""

    def _account_part(self, part: dict[str, Any], used: Collection[str], where: str) -> None:
        self.fields.account(part, used, "content[]", where=where, refused=UNSUPPORTED_PART_FIELDS)
