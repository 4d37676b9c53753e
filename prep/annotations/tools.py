"""Tools, tool calls and tool results as text, laid out as by the chat template of Qwen2.5.

The tokenizer of Qwen2.5-VL has the tokens (``<tool_call>``, ``</tool_call>``), but its chat template does not mention
tools. The layout is that of the text models of the same family (``Qwen/Qwen2.5-7B-Instruct``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from schemas.qwen import DEFAULT_SYSTEM

_TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)

# Unlike json.loads, msgspec refuses NaN and lone surrogates, which no tokenizer can encode.
_decoder = msgspec.json.Decoder(float_hook=float)


class ToolError(ValueError):
    """Tools or a call that cannot be laid out. The message says why."""


def system_with_tools(system: str, tools: object) -> str:
    """The system text, followed by the signatures of the tools. Without tools, it is unchanged.

    Args:
        system: the system text; empty for the default one.
        tools: a list of objects ``{"type": "function", "function": {...}}`` or of bare functions, a single one, or the
            JSON text of any of these.

    Raises:
        ToolError: they are something else.
    """
    tools = _parsed(tools, "the field")
    if isinstance(tools, dict) and tools:
        tools = [tools]
    if not tools:
        return system
    if not isinstance(tools, list):
        raise ToolError("the field is not a list of objects")
    lines = []
    for tool in tools:
        tool = _parsed(tool, "a tool")
        if not isinstance(tool, dict):
            raise ToolError("a tool is not an object")
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise ToolError('a tool is not a function with a "name"')
        lines.append("\n" + _dump(tool))
    return f"{system or DEFAULT_SYSTEM}{_TOOLS_HEAD}{''.join(lines)}{_TOOLS_TAIL}"


def calls_in_text(text: str) -> list[Any]:
    """The calls in a JSON text: an object, or a list of them.

    Raises:
        ToolError: it is not JSON.
    """
    calls = _parsed(text, "a tool call")
    return calls if isinstance(calls, list) and calls else [calls]


def call_text(call: object) -> str:
    """One call: an object ``{"name", "arguments"}``, alone or below ``function``.

    Raises:
        ToolError: it has no name, or its arguments are not an object.
    """
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolError('a tool call is not an object {"name", "arguments"}')
    arguments = _parsed(call.get("arguments", {}), "arguments")
    if not isinstance(arguments, dict):
        raise ToolError(f"the arguments of {call['name'][:40]!r} are not an object")
    return f'<tool_call>\n{{"name": {_dump(call["name"])}, "arguments": {_dump(arguments)}}}\n</tool_call>'


def answer_with_calls(content: str, calls: Iterable[object]) -> str:
    """The model's turn: its text, if any, then its calls, each on a new line.

    Raises:
        ToolError: a call cannot be laid out.
    """
    return "\n".join([*([content] if content else []), *map(call_text, calls)])


def result_text(content: str) -> str:
    """A tool's result as a piece of the user's turn."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ToolError("a number is too large for JSON") from error


def _parsed(value: Any, name: str) -> Any:
    """The value, or the JSON in it if it is text."""
    if not isinstance(value, str):
        return value
    try:
        return _decoder.decode(value)
    except RecursionError:
        raise ToolError(f"{name} is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise ToolError(f"{name} is text that is not JSON ({error})") from error
